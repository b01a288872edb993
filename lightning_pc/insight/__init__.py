"""Insight: what inference did, in numbers and in words."""
