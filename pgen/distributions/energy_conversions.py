"""Conversions that answer for a density known up to a constant: sums, integrals, and draws by chains.

Estimates of log Z by annealing are in `energy_partition`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Size, Tensor

from pgen.algorithms.energy.draws import LongRun
from pgen.capability import Capability, Exactness
from pgen.conversion import Conversion
from pgen.distributions.energy_learning import conditional, on_rows, space_of, start_of, sweep_of, unmovable
from pgen.registry import hookimpl

Methods = Mapping[str, Callable[..., Any]]
_DENSITY = frozenset({Capability.LOG_DENSITY})


def drawn_by(how: LongRun, *, name: str = "chains", cost: float = 500.0) -> Conversion:
    """From a density up to a constant to draws, by chains.

    Args:
        how: kernels, warm-up, thinning.
        name: what it is asked for by.
        cost: of one use, relative to others.

    Example:
        >>> from pgen.algorithms.kernels.hmc import HMC
        >>> drawn_by(LongRun(continuous=HMC(steps=5)), name="hmc").name
        'hmc'
    """

    def methods(law: Any) -> Methods:
        @torch.no_grad()
        def sample(sample_shape: Any = Size()) -> Tensor:
            """Draws of chains, `[*sample_shape, *batch_shape, *event_shape]`."""
            lead = Size(sample_shape) + law.batch_shape
            n = lead.numel()
            each = lead if conditional(law) else Size((min(n, how.chains),))
            start, reference = start_of(law, each)
            drawn = how(
                on_rows(law, each),
                start,
                space_of(law),
                n,
                reference=reference,
                sweep=sweep_of(law),
            )
            return drawn.reshape(lead + law.event_shape)

        return {"sample": sample}

    return Conversion(name, _DENSITY, Capability.SAMPLE, Exactness.ESTIMATE, cost, methods, unless=unmovable)


CONVERSIONS: tuple[Conversion, ...] = (drawn_by(LongRun()),)


@hookimpl
def pgen_conversions() -> list[Conversion]:
    """The conversions, for the registry."""
    return list(CONVERSIONS)
