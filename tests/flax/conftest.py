"""For all tests of the Flax modules."""

import pytest


@pytest.fixture(autouse=True)
def _quickly(quick_compilation):
    """They compare with Flax, and how well XLA optimizes is no part of it."""
