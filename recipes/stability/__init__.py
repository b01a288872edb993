"""Does training succeed without tuning? Learning rates, depths and architectures."""
