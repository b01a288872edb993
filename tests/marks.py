"""Marks that tests give to some of their cases."""

import pytest


def mostly_slow(cases, *quick):
    """The cases of a test, all but the ``quick`` ones marked as slow."""
    return [case if case in quick else pytest.param(case, marks=pytest.mark.slow) for case in cases]
