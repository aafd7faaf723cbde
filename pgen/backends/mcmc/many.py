"""Posteriors of many data sets at once: every chain of every data set is a row of one batch.

Step size and scale are shared by all rows, while posteriors lie in different places; so after a first run each data set
gets coordinates of its own, in which its posterior is centred and of unit spread, and a second run draws in those.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pgen.algorithms.kernels.base import LogDensity
from pgen.algorithms.record import Recorded
from pgen.backends.mcmc.start import uniform
from pgen.density import Density
from pgen.training.batches import derive

_PILOT = 100  # draws of each chain that the coordinates are made from
_PER_DRAW = 3  # iterations that a draw worth having takes, about


def many(
    density: Density,
    data: Mapping[str, Tensor],
    sampler: Callable[[LogDensity], Any],
    chains: int,
    n: int,
    seed: int,
    lift: bool,
) -> list[dict[str, Tensor]]:
    """Draws of every latent for each of R data sets.

    Args:
        density: of the program on any one of them.
        data: observations `[R, ...]` by site.
        sampler: makes a sampler of a target.
        chains: for each data set.
        n: independent draws wanted of each.
        seed: determines every draw.
        lift: compute in double precision.

    Returns:
        for each data set the values by site, `[m, ...]`, m at least n.
    """
    dtype = torch.float64 if lift else density.dtype
    # What is observed moves with the data set, so it enters the recording as an input.
    named = tuple(data)
    of_data = Recorded(lambda u, *seen: density.on_many(u, dict(zip(named, seen, strict=True))), lift=lift)
    seen = tuple(v.to(dtype) if lift and v.is_floating_point() else v for v in data.values())

    def target(positions: Tensor) -> tuple[Tensor, Tensor]:
        return of_data(positions, *seen)

    sets = len(seen[0])
    torch.manual_seed(derive(seed, "many", "start"))
    position = uniform(target, sets * chains, density.size, density, dtype)
    pilot = _sampled(sampler(target), position, _PILOT)
    rows = pilot.unflatten(1, (sets, chains))
    spread = rows.transpose(0, 1).flatten(1, 2)
    centre = spread.mean(1).repeat_interleave(chains, 0)
    scale = spread.std(1).clamp_min(1e-12).repeat_interleave(chains, 0)

    def centred(x: Tensor) -> tuple[Tensor, Tensor]:
        value, gradient = target(centre + scale * x)
        return value, gradient * scale

    draws = -(-n * _PER_DRAW // chains)
    x = _sampled(sampler(centred), (pilot[-1] - centre) / scale, draws)
    positions = (centre + scale * x).unflatten(1, (sets, chains))  # [draws, R, C, d]
    flat = positions.permute(1, 2, 0, 3).flatten(0, 2).to(density.dtype)
    parts: dict[str, list[Tensor]] = {}
    values = (
        density.values if not density.finite else partial(_with_choices, density, data, len(flat) // sets)
    )
    for name, value in values(flat).items():
        parts[name] = list(value.unflatten(0, (sets, -1)))
    return [{name: value[r] for name, value in parts.items()} for r in range(sets)]


def _sampled(sampler: Any, position: Tensor, draws: int) -> Tensor:
    state = sampler.begin(position)
    while not sampler.warmed(state):
        state, _ = sampler.warm(state)
    return sampler.run(sampler.ready(state), draws)[1].positions


def _with_choices(density: Density, data: Mapping[str, Tensor], each: int, flat: Tensor) -> dict[str, Tensor]:
    """Continuous latents, and finite ones drawn given them and the data set that each draw belongs to."""
    found = density.values(flat)
    seen = {name: value.repeat_interleave(each, 0) for name, value in data.items()}
    return found | density.choices(flat, seen)
