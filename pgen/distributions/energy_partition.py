"""Conversions from a density known up to a constant to a log probability: the constant, summed, integrated or estimated.

A law that is the same in all rows has one log Z; one that is conditioned on inputs has one for every row, and they are computed
side by side. They are computed when first asked for, and kept as long as the density stays what it is at a few places. A law that
depends on latents has another at every value of theirs, which can be learned with, and is not kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Size, Tensor

from pgen.algorithms.energy.annealed import Annealing
from pgen.algorithms.energy.draws import LongRun
from pgen.algorithms.energy.quadrature import quadrature
from pgen.algorithms.energy.reference import Pool, Reference, References, closest
from pgen.algorithms.energy.route import Own, Tilted
from pgen.algorithms.energy.sums import enumerated
from pgen.algorithms.energy.walks import Usual
from pgen.capability import Capability, Exactness
from pgen.conversion import Conversion, Normaliser
from pgen.distributions.energy_learning import (
    base_of,
    several,
    space_of,
    start_of,
    sweep_of,
    tensors_of,
    unmovable,
)
from pgen.errors import Unanswerable
from pgen.registry import hookimpl

_PROBES = 16
_CHAINS, _FEW = 20_000, 50  # of all laws together, where there are several, and of each at least
_WIDER = 1.3  # than the draws: the law to begin with has to cover their tails
_SUMMED = 2**22  # values of a finite space
_GRIDDED = 2  # numbers
_STATES = 64  # of discrete numbers beside them

Compute = Callable[[Any], Normaliser]


def normalised_by(
    name: str,
    compute: Compute,
    exactness: Exactness,
    cost: float,
    unless: Callable[[Any, Any], str | None],
    purpose: Any = "answering",
) -> Conversion:
    """The conversion to a log probability by a way to have log Z.

    Args:
        name: what it is asked for by.
        compute: from the law to its normaliser.
        exactness: of the result.
        cost: relative to others.
        unless: where it cannot be used.
        purpose: `"answering"`: it is computed once and kept; `"learning"`: at every step, with its gradient.
    """

    def methods(law: Any) -> Mapping[str, Callable[..., Any]]:
        def log_prob(value: Tensor) -> Tensor:
            """Log density less log Z."""
            log_z = compute(law).value if purpose == "learning" else kept(law, name, compute).value
            density = law.log_density(value)
            return density - log_z.to(density.dtype)

        return {"log_prob": log_prob}

    needs = frozenset({Capability.LOG_DENSITY})
    return Conversion(
        name, needs, Capability.LOG_PROB, exactness, cost, methods, purpose=purpose, unless=unless
    )


def kept(law: Any, name: str, compute: Compute) -> Normaliser:
    """The normaliser, computed anew only where the density is another one than when it was computed."""
    with torch.no_grad():
        space = space_of(law)
        like = like_of(law)
        density, laws = several(law)
        generator = torch.Generator().manual_seed(0)
        q = torch.randn(_PROBES, space.dims, generator=generator).to(like)
        sizes = torch.tensor(space.cardinalities)
        z = (torch.rand(_PROBES, len(sizes), generator=generator) * sizes).long().to(like.device)
        at = space.together(q, z).repeat_interleave(laws.numel(), 0)
        probes = density(at).double()
        found = law.found.get(name)
        if found is None or not _same(found.probes, probes):
            try:
                found = compute(law)._replace(probes=probes)
            except (ValueError, RuntimeError) as error:
                raise Unanswerable(
                    f"log Z of {type(law.base).__name__}{tuple(law.event_shape)} by {name}: {error}"
                ) from error
            law.found[name] = found
    return found


def _same(before: Tensor, now: Tensor) -> bool:
    return before.shape == now.shape and torch.allclose(before, now, rtol=1e-5, atol=1e-6, equal_nan=True)


def like_of(law: Any) -> Tensor:
    """An empty tensor of the type and on the device of a law's values."""
    held = next((t for t in tensors_of(law) if t.is_floating_point()), None)
    base = base_of(law)
    if held is None and base is not None:
        held = next((t for t in vars(base).values() if isinstance(t, Tensor) and t.is_floating_point()), None)
    return torch.empty(0) if held is None else held.detach().new_empty(0)


def _integrated(law: Any) -> Normaliser:
    density, laws = several(law)
    found = quadrature(density, space_of(law), like_of(law), laws=laws.numel())
    return Normaliser(found.log_z.reshape(laws), error=found.error.reshape(laws))


def _summed(law: Any) -> Normaliser:
    density, laws = several(law)
    found = enumerated(density, space_of(law), like_of(law), laws=laws.numel())
    return Normaliser(found.reshape(laws))


def annealed_by(
    how: Annealing, draws: LongRun, *, name: str = "annealed-importance", cost: float = 1000.0
) -> Conversion:
    """log Z by annealed importance sampling, up from a law that is known and down from draws of long chains.

    Args:
        how: how many chains and rungs.
        draws: how the draws are made that chains come down from, and that the law to begin with is fitted to, where the
            energy tilts no law that can be drawn from.
        name: what it is asked for by.
        cost: of one use, relative to others.
    """

    def compute(law: Any) -> Normaliser:
        space, (density, laws) = space_of(law), several(law)
        each = laws.numel()
        chains = min(draws.chains, max(_FEW, _CHAINS // each)) if laws else draws.chains
        start, reference = start_of(law, Size((chains, *laws)))
        drawn = draws(density, start, space, chains * each, reference=reference, sweep=sweep_of(law))
        if laws:
            beside = min(how.chains, max(_FEW, _CHAINS // each))
            fewer = replace(how, chains=beside, pilot=min(how.pilot, beside), trial=min(how.trial, beside))
            route: Any = Tilted(References(drawn, space, each, widen=_WIDER), density, Usual(space).walk())
            found = fewer.run(route, drawn, laws=each)
            sides = (found.log_z, found.stderr, found.lower, found.upper)
            return Normaliser(*(None if v is None else v.reshape(laws) for v in sides))  # type: ignore[arg-type]
        flat = base_of(law) is None
        tempered = getattr(getattr(law, "energy", None), "tempered", None) if flat else None
        if tempered is not None:
            route = Own(tempered)
        else:
            # Chains begin at draws that are independent: not at those of a pool.
            fresh = reference.law if isinstance(reference, Pool) else reference
            known = closest(drawn, Reference(drawn, space, widen=_WIDER), fresh)
            route = Tilted(known, density, Usual(space).walk())
        found = how.run(route, drawn)
        return Normaliser(found.log_z, found.stderr, found.lower, found.upper)

    return normalised_by(name, compute, Exactness.ESTIMATE, cost, _not_kept)


def _not_kept(site: Any, structure: Any) -> str | None:
    """Why constants of a site cannot be computed once and kept, if they cannot."""
    told = unmovable(site, structure)
    if told is None and site.parents:
        told = f"it is another law, with a constant of its own, for every value of {site.parents[0]}"
    return told


def _not_gridded(site: Any, structure: Any) -> str | None:
    told = unmovable(site, structure)
    if told is not None:
        return told
    space = space_of(site)
    states = 1
    for k in space.cardinalities:
        states *= k
    if not 0 < space.dims <= _GRIDDED or states > _STATES:
        return f"a grid is for one or two numbers, and here are {space.dims} with {states} discrete states beside them"
    return None


def _not_summed(site: Any, structure: Any) -> str | None:
    told = unmovable(site, structure)
    if told is not None:
        return told
    states = space_of(site).states
    return (
        None
        if 0 < states <= _SUMMED
        else f"values that can be summed over are finite and at most {_SUMMED:,}"
    )


def _either(*reasons: Callable[[Any, Any], str | None]) -> Callable[[Any, Any], str | None]:
    def told(site: Any, structure: Any) -> str | None:
        return next((why for reason in reasons if (why := reason(site, structure)) is not None), None)

    return told


CONVERSIONS: tuple[Conversion, ...] = (
    normalised_by("quadrature", _integrated, Exactness.ESTIMATE, 5.0, _either(_not_kept, _not_gridded)),
    normalised_by(
        "quadrature-likelihood", _integrated, Exactness.SURROGATE, 1000.0, _not_gridded, "learning"
    ),
    normalised_by("enumeration", _summed, Exactness.EXACT, 50.0, _either(_not_kept, _not_summed)),
    normalised_by("enumeration-likelihood", _summed, Exactness.SURROGATE, 1000.0, _not_summed, "learning"),
    annealed_by(Annealing(chains=1000, most=1000), LongRun(chains=500)),
)


@hookimpl
def pgen_conversions() -> list[Conversion]:
    """The conversions, for the registry."""
    return list(CONVERSIONS)
