"""Tests of what is written: README, the site, the pages of results."""
