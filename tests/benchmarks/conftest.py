"""Settings of the tests of the benchmarks."""

import pytest


@pytest.fixture(autouse=True)
def _allow_xla(monkeypatch):
    """They run where no kernel was compiled, too."""
    monkeypatch.setenv("JAX_LAYERNORM_ALLOW_XLA", "1")
