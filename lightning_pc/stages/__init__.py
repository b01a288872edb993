"""Stages: a recording cut at its value nodes, and how the pieces run again."""
