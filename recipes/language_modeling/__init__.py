"""Masked and conditional BERT on the One Billion Word Benchmark."""
