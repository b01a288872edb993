"""Inference: how values are relaxed, and when weights learn."""
