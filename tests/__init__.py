"""Tests of the engine, of the recipes and of the pages; they import each other from here."""
