"""Tests of studies and recipes."""
