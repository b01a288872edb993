"""Recipes: real tasks, each trained by backpropagation and by predictive coding from YAMLs."""
