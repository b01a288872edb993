"""Handwritten digits, 8x8: the first recipe, small enough for every machine."""
