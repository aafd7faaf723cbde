"""Leaving no trace: random state, Pyro's store, default dtype and validation are as they were, whatever runs inside."""

from __future__ import annotations

import operator
import random
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import pyro
import torch
from torch.distributions import Distribution

from pgen.errors import OptionError

_ONE_AT_A_TIME = threading.RLock()  # Pyro's handler stack and parameter store belong to the process


@contextmanager
def isolated(seed: int, precision: str | None = None) -> Iterator[int]:
    """Run with seeded generators and an empty parameter store, and restore everything afterwards.

    Under the precision "float64" that is the default dtype inside. Pyro keeps one handler stack for the whole process,
    so threads take turns here.
    """
    with _ONE_AT_A_TIME, _validation_restored():
        dtype, grad = torch.get_default_dtype(), torch.is_grad_enabled()
        numpy_state, python_state = np.random.get_state(), random.getstate()  # noqa: NPY002 - theirs, kept as it is
        devices = (
            list(range(torch.cuda.device_count()))
            if torch.cuda.is_available() and torch.cuda.is_initialized()
            else []
        )
        try:
            with torch.random.fork_rng(devices=devices), pyro.get_param_store().scope():
                torch.manual_seed(seed)
                np.random.seed(seed % 2**32)  # noqa: NPY002
                random.seed(seed)
                if precision == "float64":
                    torch.set_default_dtype(torch.float64)
                yield seed
        finally:
            np.random.set_state(numpy_state)  # noqa: NPY002
            random.setstate(python_state)
            torch.set_grad_enabled(grad)
            torch.set_default_dtype(dtype)


@contextmanager
def validating(enabled: bool) -> Iterator[None]:
    """Run with the checks of torch's and Pyro's distributions on or off, and restore each flag as it was.

    `pyro.validation_enabled` takes torch's flag to be what Pyro's is, and changes it where it is not (importing zuko
    turns torch's alone off).
    """
    with _validation_restored():
        pyro.enable_validation(enabled)
        laws = cast("Any", Distribution)
        checks = laws._validate_sample
        try:
            # Laws that were made before, such as priors of a `PyroSample`, would go on checking by themselves.
            laws._validate_sample = checks if enabled else _unchecked
            yield
        finally:
            laws._validate_sample = checks


def _unchecked(law: Distribution, value: torch.Tensor) -> None:
    """In the place of a check that a value is in the support."""


@contextmanager
def _validation_restored() -> Iterator[None]:
    torchs = torch.distributions.Distribution._validate_args
    names = ("validate_distributions_pyro", "validate_infer", "validate_poutine")
    pyros = {name: pyro.settings.get(name) for name in names}
    try:
        yield
    finally:
        pyro.settings.set(**pyros)
        torch.distributions.Distribution.set_default_validate_args(torchs)


def seed_or_fresh(seed: int | None) -> int:
    """The seed given, or fresh entropy: a call without a seed differs every time, and records what it used."""
    return secrets.randbits(63) if seed is None else whole_seed(seed)


def whole_seed(seed: Any) -> int:
    """A seed as torch takes it.

    Raises:
        OptionError: it is no whole number from 0 to 2^63 - 1.
    """
    if isinstance(seed, bool) or not hasattr(seed, "__index__") or not 0 <= operator.index(seed) < 2**63:
        raise OptionError(f"seed is {seed!r}; expected a whole number, 0 <= seed < 2**63, or None")
    return operator.index(seed)
