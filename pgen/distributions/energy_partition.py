"""Conversions from a density known up to a constant to a log probability: the constant, summed, integrated or estimated.

A law that is the same in all rows has one log Z. It is computed when it is first asked for, and kept as long as the density
stays what it is at a few places.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Size, Tensor

from pgen.algorithms.energy.annealed import Annealing
from pgen.algorithms.energy.draws import LongRun
from pgen.algorithms.energy.quadrature import quadrature
from pgen.algorithms.energy.reference import Pool, Reference, closest
from pgen.algorithms.energy.route import Own, Tilted
from pgen.algorithms.energy.sums import enumerated
from pgen.algorithms.energy.walks import Usual
from pgen.capability import Capability, Exactness
from pgen.conversion import Conversion, Normaliser
from pgen.distributions.energy_learning import (
    base_of,
    on_rows,
    space_of,
    start_of,
    sweep_of,
    tensors_of,
    unmovable,
)
from pgen.errors import Unanswerable
from pgen.registry import hookimpl

_PROBES = 16
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
        generator = torch.Generator().manual_seed(0)
        q = torch.randn(_PROBES, space.dims, generator=generator).to(like)
        sizes = torch.tensor(space.cardinalities)
        z = (torch.rand(_PROBES, len(sizes), generator=generator) * sizes).long().to(like.device)
        density = on_rows(law, Size((_PROBES,)))(space.together(q, z)).double()
        found = law.found.get(name)
        if found is None or not torch.allclose(found.probes, density, rtol=1e-5, atol=1e-6, equal_nan=True):
            try:
                found = compute(law)._replace(probes=density)
            except (ValueError, RuntimeError) as error:
                raise Unanswerable(
                    f"log Z of {type(law.base).__name__}{tuple(law.event_shape)} by {name}: {error}"
                ) from error
            law.found[name] = found
    return found


def like_of(law: Any) -> Tensor:
    """An empty tensor of the type and on the device of a law's values."""
    held = next((t for t in tensors_of(law) if t.is_floating_point()), None)
    base = base_of(law)
    if held is None and base is not None:
        held = next((t for t in vars(base).values() if isinstance(t, Tensor) and t.is_floating_point()), None)
    return torch.empty(0) if held is None else held.detach().new_empty(0)


def _integrated(law: Any) -> Normaliser:
    found = quadrature(on_rows(law, Size()), space_of(law), like_of(law))
    return Normaliser(found.log_z, error=found.error)


def _summed(law: Any) -> Normaliser:
    return Normaliser(enumerated(on_rows(law, Size()), space_of(law), like_of(law)))


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
        space, density = space_of(law), on_rows(law, Size())
        start, reference = start_of(law, Size((draws.chains,)))
        drawn = draws(density, start, space, draws.chains, reference=reference, sweep=sweep_of(law))
        flat = base_of(law) is None
        tempered = getattr(getattr(law, "energy", None), "tempered", None) if flat else None
        if tempered is not None:
            route: Any = Own(tempered)
        else:
            fresh = (
                reference.law if isinstance(reference, Pool) else reference
            )  # chains begin at draws that are independent
            known = closest(drawn, Reference(drawn, space, widen=_WIDER), fresh)
            route = Tilted(known, density, Usual(space).walk())
        found = how.run(route, drawn)
        return Normaliser(found.log_z, found.stderr, found.lower, found.upper)

    return normalised_by(name, compute, Exactness.ESTIMATE, cost, one_law)


def one_law(site: Any, structure: Any) -> str | None:
    """Why a site has no single log Z, if it has none."""
    told = unmovable(site, structure)
    if told is None and (site.parents or site.inputs):
        told = f"it is another law, with a constant of its own, for every {(*site.parents, *site.inputs)[0]}"
    return told


def _not_gridded(site: Any, structure: Any) -> str | None:
    told = one_law(site, structure)
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
    told = one_law(site, structure)
    if told is not None:
        return told
    states = space_of(site).states
    return (
        None
        if 0 < states <= _SUMMED
        else f"values that can be summed over are finite and at most {_SUMMED:,}"
    )


CONVERSIONS: tuple[Conversion, ...] = (
    normalised_by("quadrature", _integrated, Exactness.ESTIMATE, 5.0, _not_gridded),
    normalised_by(
        "quadrature-likelihood", _integrated, Exactness.SURROGATE, 1000.0, _not_gridded, "learning"
    ),
    normalised_by("enumeration", _summed, Exactness.EXACT, 50.0, _not_summed),
    normalised_by("enumeration-likelihood", _summed, Exactness.SURROGATE, 1000.0, _not_summed, "learning"),
    annealed_by(Annealing(chains=1000, most=1000), LongRun(chains=500)),
)


@hookimpl
def pgen_conversions() -> list[Conversion]:
    """The conversions, for the registry."""
    return list(CONVERSIONS)
