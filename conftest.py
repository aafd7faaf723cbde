"""For every test: a seed of its own, and a guard that fails it when it leaves global state behind."""

from __future__ import annotations

import random
import secrets
import zlib

import numpy as np
import pyro
import pytest
import torch
from pyro.poutine import runtime


def pytest_addoption(parser):
    parser.addoption("--seed", default="0", help="seed of the suite: a number, or 'random' for a fresh one")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    """Settle the seed once, before pytest-xdist copies the options to its workers."""
    if config.option.seed == "random":
        config.option.seed = str(secrets.randbelow(2**31))
    if not config.option.seed.isdigit():
        raise pytest.UsageError(f"--seed takes a number or 'random', got {config.option.seed!r}")
    if getattr(config.option, "randomly_seed", None) == "default":  # order follows the same seed
        config.option.randomly_seed = int(config.option.seed)


def pytest_report_header(config):
    return f"seed: {config.option.seed} (repeat this run with --seed={config.option.seed})"


@pytest.fixture
def seed(request):
    """A seed of this test's own: the same wherever and in whatever order the test runs."""
    return zlib.crc32(f"{request.config.option.seed}:{request.node.nodeid}".encode()) & 0x7FFFFFFF


@pytest.fixture(autouse=True)
def _seeded(seed):
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  what scikit-learn and Pyro draw from
    torch.manual_seed(seed)


@pytest.fixture
def one_thread():
    """For tensors too small to share, and bits that depend on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def compiler_cache(tmp_path_factory, monkeypatch):
    """What torch's compiler finds out about the machine, once for all tests."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "torch"))


def _state():
    """What a test shares with every other test of its process, and so must not change."""
    return {
        "torch default dtype": torch.get_default_dtype(),
        "torch default device": torch.get_default_device(),
        "torch gradient mode": torch.is_grad_enabled(),
        "torch deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "Pyro param store": sorted(pyro.get_param_store()),
        "Pyro handler stack": list(runtime._PYRO_STACK),
        **{f"Pyro setting {name}": value for name, value in pyro.settings.get().items()},
    }


def _restore(before):
    torch.set_default_dtype(before["torch default dtype"])
    torch.set_default_device(before["torch default device"])
    torch.set_grad_enabled(before["torch gradient mode"])
    torch.use_deterministic_algorithms(before["torch deterministic algorithms"])
    pyro.clear_param_store()
    runtime._PYRO_STACK.clear()
    pyro.settings.set(
        **{n.removeprefix("Pyro setting "): v for n, v in before.items() if n.startswith("Pyro setting ")}
    )


@pytest.fixture(autouse=True)
def _leaves_nothing_behind(_seeded):
    before = _state()
    yield
    after = _state()
    changed = [f"{name}: {before[name]} -> {after[name]}" for name in before if before[name] != after[name]]
    if changed:
        _restore(before)
        pytest.fail("the test left global state behind:\n  " + "\n  ".join(changed), pytrace=False)
