"""For all tests of training."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread():
    """These tensors are too small to share, and bits depend on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _replayed(monkeypatch):
    """Short runs too: what is true of a run is true of its replays."""
    monkeypatch.setattr("pgen.training.replays.FEWEST_STEPS", 0)
