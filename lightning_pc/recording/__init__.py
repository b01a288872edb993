"""THE IDEA: the user's forward runs once, and every torch call that matters is recorded."""
