"""For all tests of training."""

import pytest


@pytest.fixture(autouse=True)
def _by_one(one_thread):
    """Wherever bits are compared."""


@pytest.fixture(autouse=True)
def _replayed(monkeypatch):
    """Short runs too: what is true of a run is true of its replays."""
    monkeypatch.setattr("pgen.training.replays.FEWEST_STEPS", 0)
