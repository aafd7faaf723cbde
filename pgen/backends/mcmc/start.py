"""Where chains begin: unconstrained vectors with a finite density."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pgen.algorithms.pathfinder import Pathfinder
from pgen.density import Density
from pgen.errors import OptionError, ProgramError
from pgen.predictive import log_likelihood
from pgen.sampling import draw

Target = Callable[[Tensor], tuple[Tensor, Tensor]]
_TRIES = 100
_OFFERS, _MOST_DRAWS = 200, 2000  # draws that are weighed for each chain and row; draws in all
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


def learned(fitted: Any, chains: int, density: Density, dtype: torch.dtype) -> Tensor:
    """What another fit knows of the latents: its posterior draws; or draws of it, where it observed them.

    Such draws are of the prior here, and are taken by the likelihood of the data, for each row by itself where rows are
    independent (sampling importance resampling). So chains of an energy that was learned begin where its modes are.

    Raises:
        OptionError: the fit knows nothing of some latent, or the latents have other shapes.
    """
    names = [slot.name for slot in density.slots]
    if not set(names) & set(fitted.structure.observed):
        return given(fitted.posterior(n=chains, seed=0), chains, density, dtype)
    structure = density.structure
    plate = None if structure.tied else structure.plates[structure.data_plate or ""]
    site = structure.sites[names[0]]
    first = next(slot for slot in density.slots if slot.name == site.name)
    rows = () if plate is None else (first.shape[plate.dim - len(site.event_shape)],)
    problem = replace(density.problem, rows=rows[0]) if rows else density.problem
    count = min(_MOST_DRAWS, _OFFERS * (rows[0] if rows else chains))
    drawn = fitted.sample(count, seed=0)
    absent = [name for name in structure.latents if name not in drawn]
    if absent:
        raise OptionError(
            f"init is a fit without a site {absent[0]!r}; expected one that draws {', '.join(structure.latents)}"
        )
    offers = min(count, _OFFERS)
    picked = torch.randint(count, (offers, *rows), device=problem.device)
    offered = {name: drawn[name].to(problem.device)[picked] for name in structure.latents}
    for slot in density.slots:
        if offered[slot.name].shape[1:] != slot.shape:
            raise OptionError(
                f"init draws {slot.name!r} with shape {tuple(offered[slot.name].shape[1:])}; expected {tuple(slot.shape)}"
            )
    with torch.no_grad():
        terms = log_likelihood(problem, structure, offered)
    # Of each row, or of all together, `[offers, rows or 1]`.
    weight = sum(t.double().reshape(offers, *(rows or (1,)), -1).sum(-1) for t in terms.values())
    weight = torch.as_tensor(weight).nan_to_num(nan=-torch.inf)
    best = torch.multinomial((weight - weight.amax(0)).exp().mT, chains, replacement=True).mT
    where = (best, torch.arange(len(best[0]), device=best.device)) if rows else (best[:, 0],)
    return given({name: offered[name][where] for name in names}, chains, density, dtype)


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
