"""What runs isolated leaves no trace, and is determined by its seed."""

import random
import threading

import numpy as np
import pyro
import pytest
import torch

from pgen.isolation import isolated, seed_or_fresh, validating
from pgen.testing.subject import changed, observe


def wreck():
    torch.rand(3)
    np.random.rand(3)  # noqa: NPY002
    random.random()
    pyro.param("leaked", torch.zeros(1))
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    torch.distributions.Distribution.set_default_validate_args(False)
    pyro.enable_validation(False)


@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_as_it_was(fails):
    pyro.param("mine", torch.ones(1))
    before = observe()
    try:
        with isolated(3):
            assert list(pyro.get_param_store()) == []
            wreck()
            if fails:
                raise ZeroDivisionError
    except ZeroDivisionError:
        assert fails
    assert changed(before, observe()) == []
    pyro.clear_param_store()


def test_the_seed_determines_every_generator():
    def numbers(seed):
        with isolated(seed):
            return torch.rand(2).tolist(), np.random.rand(2).tolist(), [random.random()]  # noqa: NPY002

    assert numbers(1) == numbers(1)
    assert all(a != b for a, b in zip(numbers(1), numbers(2), strict=True))


def test_any_seed_will_do():
    for seed in (0, 2**32, 2**63 - 1):
        with isolated(seed):
            torch.rand(1)


def test_isolation_nests():
    with isolated(1):
        outer = torch.rand(1)
        with isolated(2):
            inner = torch.rand(1)
        after = torch.rand(1)
    with isolated(1):
        assert torch.equal(outer, torch.rand(1))
        assert torch.equal(after, torch.rand(1))
    with isolated(2):
        assert torch.equal(inner, torch.rand(1))


def test_threads_take_turns():
    inside, overlaps, found = [], [], {}

    def work(i):
        with isolated(i % 3):
            overlaps.append(len(inside))
            inside.append(i)
            pyro.param("x", torch.tensor(float(i)))
            found[i] = (pyro.param("x").item(), torch.rand(3).tolist())
            inside.remove(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(overlaps) == {0}
    assert all(value == i for i, (value, _) in found.items())
    assert found[0][1] == found[3][1] == found[9][1] != found[1][1]


def test_fresh_seeds_differ():
    assert seed_or_fresh(5) == 5
    assert len({seed_or_fresh(None) for _ in range(20)}) == 20


@pytest.mark.parametrize("torchs", [True, False])
@pytest.mark.parametrize("enabled", [True, False])
def test_validation_flags_are_restored_one_by_one(torchs, enabled):
    before = torch.distributions.Distribution._validate_args
    torch.distributions.Distribution.set_default_validate_args(torchs)  # Pyro's stays
    try:
        with validating(enabled):
            assert torch.distributions.Distribution._validate_args is enabled
            assert pyro.settings.get("validate_distributions_pyro") is enabled
        assert torch.distributions.Distribution._validate_args is torchs
        with isolated(0):
            pyro.enable_validation(enabled)
        assert torch.distributions.Distribution._validate_args is torchs
    finally:
        torch.distributions.Distribution.set_default_validate_args(before)
