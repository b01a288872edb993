"""Associative memories: stored pictures, recalled from parts and from noise."""
