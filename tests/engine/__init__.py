"""Tests of the package, and what they share: problems, oracles, small LightningModules."""
