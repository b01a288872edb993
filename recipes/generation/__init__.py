"""Generative networks: energies, digits from causes."""
