"""Leaving no trace: random state, Pyro's store, default dtype and validation are as they were, whatever runs inside."""

from __future__ import annotations

import random
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pyro
import torch

_ONE_AT_A_TIME = threading.RLock()  # Pyro's handler stack and parameter store belong to the process


@contextmanager
def isolated(seed: int, precision: str | None = None) -> Iterator[int]:
    """Run with seeded generators and an empty parameter store, and restore everything afterwards.

    Under the precision "float64" that is the default dtype inside. Pyro keeps one handler stack for the whole process, so threads take turns here.
    """
    with _ONE_AT_A_TIME:
        dtype = torch.get_default_dtype()
        validate = torch.distributions.Distribution._validate_args
        pyro_validate = pyro.settings.get("validate_distributions_pyro"), pyro.settings.get("validate_infer"), pyro.settings.get("validate_poutine")
        grad = torch.is_grad_enabled()
        numpy_state, python_state = np.random.get_state(), random.getstate()  # noqa: NPY002 - theirs, kept as it is
        devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() and torch.cuda.is_initialized() else []
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
            torch.distributions.Distribution.set_default_validate_args(validate)
            for name, value in zip(("validate_distributions_pyro", "validate_infer", "validate_poutine"), pyro_validate, strict=True):
                pyro.settings.set(**{name: value})


def seed_or_fresh(seed: int | None) -> int:
    """The seed given, or fresh entropy: a call without a seed differs every time, and records what it used."""
    return secrets.randbits(63) if seed is None else int(seed)
