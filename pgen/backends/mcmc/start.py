"""Where chains begin: unconstrained vectors with a finite density."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from pgen.algorithms.pathfinder import Pathfinder
from pgen.density import Density
from pgen.errors import OptionError, ProgramError
from pgen.sampling import draw

Target = Callable[[Tensor], tuple[Tensor, Tensor]]
_TRIES = 100
_RADIUS = 2.0  # Stan's: unconstrained values uniform on (-2, 2)


def uniform(target: Target, chains: int, size: int, density: Density, dtype: torch.dtype) -> Tensor:
    """Independent uniform vectors on (-2, 2), drawn again where the density or its gradient is not finite.

    Raises:
        ProgramError: a hundred rounds, in ever smaller boxes, did not give one finite point.
    """
    device = density.problem.device

    def propose(attempt: int) -> Tensor:
        radius = _RADIUS * 0.9**attempt
        return (2 * torch.rand(chains, size, dtype=dtype, device=device) - 1) * radius

    return _finite(target, propose, density)


def base(target: Target, chains: int, size: int, density: Density, dtype: torch.dtype) -> Tensor:
    """Independent standard normal vectors: draws of the guide, for a density in its coordinates."""
    device = density.problem.device
    return _finite(target, lambda _: torch.randn(chains, size, dtype=dtype, device=device), density)


def prior(target: Target, chains: int, size: int, density: Density, dtype: torch.dtype) -> Tensor:
    """Independent draws of the prior."""

    def propose(attempt: int) -> Tensor:
        drawn = draw(density.problem.whole(), density.structure, chains)
        return density.unconstrained({s.name: drawn[s.name] for s in density.slots}).to(dtype)

    return _finite(target, propose, density)


def pathfinder(target: Target, chains: int, size: int, density: Density, dtype: torch.dtype) -> Tensor:
    """Draws of normals along the way to the mode, found from uniform starts, resampled by their weights."""
    return Pathfinder().run(uniform(target, min(chains, 16), size, density, dtype), target, chains).position


def given(values: Mapping[str, Any], chains: int, density: Density, dtype: torch.dtype) -> Tensor:
    """Values of the user's, one for all chains or one for each.

    Raises:
        OptionError: a latent without a value, or a value of another shape or outside of its support.
    """
    laid = {}
    for slot in density.slots:
        if slot.name not in values:
            raise OptionError(
                f"init gives no value of {slot.name!r}; expected one for each of {', '.join(s.name for s in density.slots)}"
            )
        value = torch.as_tensor(values[slot.name]).to(density.dtype)
        if value.shape == slot.shape:
            value = value.expand(chains, *slot.shape)
        elif value.shape[1:] == slot.shape and len(value) >= 1:
            value = value[torch.arange(chains) % len(value)]
        else:
            raise OptionError(
                f"init[{slot.name!r}] has shape {tuple(value.shape)}; expected {tuple(slot.shape)}, or one such value for each chain"
            )
        laid[slot.name] = value
    found = density.unconstrained(laid).to(dtype)
    if not bool(torch.isfinite(found).all()):
        raise OptionError("init holds values outside of the supports of their sites, or on their borders")
    return found


def _finite(target: Target, propose: Callable[[int], Tensor], density: Density) -> Tensor:
    position = propose(0)
    for attempt in range(1, _TRIES):
        value, gradient = target(position)
        good = torch.isfinite(value) & torch.isfinite(gradient).all(-1)
        if bool(good.all()):
            return position
        if attempt > 5 and bool(good.any()):
            # Most places are impossible: the others start where some chain could.
            lucky = good.nonzero()[:, 0]
            pick = lucky[torch.randint(len(lucky), (len(position),), device=position.device)]
            return torch.where(good.unsqueeze(-1), position, position[pick])
        position = torch.where(good.unsqueeze(-1), position, propose(attempt))
    values = density.structure.name
    raise ProgramError(
        f"no starting point of {values} has a finite log density and gradient, in {_TRIES} rounds of draws: data outside of a "
        "support, or numbers too extreme; give one: init={site: value}"
    )
