"""Conversions that draw from a density known up to a constant: chains of every kernel, annealing, parallel tempering.

    chains                                      the usual kernels and leaps; what is taken where nothing is asked for
    mala  hmc  random-walk  ula                 what is measured, by that kernel; what is counted beside it, as usual
    nuts  chees  meads                          what is measured, with the warm-up that the kernel comes with
    gibbs  gibbs-with-gradients                 what is counted, by that kernel; what is measured beside it, as usual
    discrete-langevin
    annealed  parallel-tempering                separate modes
    short-run-draws  persistent-chains          as the energy was learned: by its chains
    generator                                   in one pass, by the sampler that was learned beside it

Names are those of the kernels of `pgen.backend("mcmc", kernel=...)`. All draws are estimates: they are draws of the density in the long
run. Those of `ula` are not even then: it accepts every step, and its stationary variance is too large, by about ε²/4 of it for steps
of ε standard deviations.

`pgen.backend("exact", via={"x": "nuts"})`, or with options, `via={"x": drawn_by(AdaptedRun(NUTS(), chains=100), name="nuts")}`.
Estimates of log Z are in `energy_partition`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Size, Tensor

from pgen.algorithms.energy.adapted import AdaptedRun
from pgen.algorithms.energy.annealed_draws import AnnealedRun
from pgen.algorithms.energy.continued import Continued
from pgen.algorithms.energy.contrastive import Chains
from pgen.algorithms.energy.draws import LongRun
from pgen.algorithms.energy.reference import Law, Pool, Reference, References
from pgen.algorithms.energy.route import Own
from pgen.algorithms.energy.tempered import TemperedRun
from pgen.algorithms.kernels.chees import ChEES
from pgen.algorithms.kernels.discrete_langevin import DiscreteLangevin
from pgen.algorithms.kernels.gibbs import Gibbs, GibbsWithGradients
from pgen.algorithms.kernels.hmc import HMC
from pgen.algorithms.kernels.langevin import MALA, ULA
from pgen.algorithms.kernels.meads import MEADS
from pgen.algorithms.kernels.nuts import NUTS
from pgen.algorithms.kernels.walk import RandomWalk
from pgen.capability import Capability, Exactness
from pgen.conversion import Conversion
from pgen.distributions.energy_learning import (
    base_of,
    conditional,
    on_rows,
    space_of,
    start_of,
    sweep_of,
    unmovable,
)
from pgen.errors import Unanswerable
from pgen.registry import hookimpl

Methods = Mapping[str, Callable[..., Any]]
Unless = Callable[[Any, Any], str | None]
_DENSITY = frozenset({Capability.LOG_DENSITY})
_WIDER = 1.5  # than draws of chains: a law to begin with has to cover what they may have missed
_PILOT = LongRun(warmup=60, chains=200, leaps=0)
_EACH = 20  # draws of each of several laws, that a law to begin with is fitted to


def drawn_by(
    how: LongRun | AdaptedRun, *, name: str = "chains", cost: float = 500.0, unless: Unless | None = None
) -> Conversion:
    """From a density up to a constant to draws, by chains.

    Args:
        how: kernels, warm-up, thinning.
        name: what it is asked for by.
        cost: of one use, relative to others.
        unless: from a site and its structure to why it cannot be used there; None: the space and the kernels say.

    Example:
        >>> drawn_by(LongRun(continuous=HMC(steps=5)), name="hmc").name
        'hmc'
    """

    def draw(law: Any, lead: Size) -> Tensor:
        n, several = lead.numel(), conditional(law)
        count = how.count(n, several)
        start, reference = start_of(law, Size((count // n, *lead)) if several else Size((count,)))
        f = on_rows(law, lead if several else Size())
        return how(f, start, space_of(law), n, reference=reference, sweep=sweep_of(law))

    return _by(draw, name, cost, unless or _unless(how))


def tempered_by(
    how: AnnealedRun | TemperedRun, *, name: str, cost: float = 700.0, pilot: LongRun = _PILOT
) -> Conversion:
    """From a density up to a constant to draws, along the way from a law that is known: for separate modes.

    That law is the base that the energy tilts, where it can be drawn from; else one that is fitted to short chains. These begin where
    learning left chains, or at standard normal coordinates; a mode that lies far outside of all of them is not found.
    An energy that brings a way of its own (`tempered`, as a Boltzmann machine does) is annealed along that.

    Args:
        how: `AnnealedRun(...)` or `TemperedRun(...)`.
        name: what it is asked for by.
        cost: of one use, relative to others.
        pilot: the chains that a law to begin with is fitted to.

    Example:
        >>> tempered_by(TemperedRun(columns=200), name="parallel-tempering").name
        'parallel-tempering'
    """

    def draw(law: Any, lead: Size) -> Tensor:
        own = getattr(getattr(law, "energy", None), "tempered", None) if base_of(law) is None else None
        if own is not None and isinstance(how, AnnealedRun) and not conditional(law):
            return how.up(Own(own, how.steps), lead.numel())
        laws = law.batch_shape if conditional(law) else Size()
        f, space = on_rows(law, laws), space_of(law)
        return how(f, hot(law, f, laws, pilot), space, lead.numel(), laws=laws.numel())

    return _by(draw, name, cost, unmovable)


def hot(law: Any, f: Callable[[Tensor], Tensor], laws: Size, pilot: LongRun = _PILOT) -> Law:
    """A law as wide as an energy or wider: its base, if it can be drawn from, else one that is fitted to short chains."""
    space, each = space_of(law), laws.numel()
    chains = max(_EACH, pilot.chains // each) if laws else pilot.chains
    start, base = start_of(law, Size((chains, *laws)))
    if base is not None:
        return base.law if isinstance(base, Pool) else base
    drawn = pilot(f, start, space, len(start), sweep=sweep_of(law))
    if not laws:
        return Reference(drawn, space, widen=_WIDER)
    return References(drawn, space, each, widen=_WIDER)


def continued_by(how: Continued, learned: str, *, name: str, cost: float = 800.0) -> Conversion:
    """From an energy that was learned by chains to draws by the same chains.

    Args:
        how: where they begin, and how far they go on.
        learned: the conversion that it was learned by.
        name: what it is asked for by.
        cost: of one use, relative to others.

    Example:
        >>> continued_by(Continued(from_noise=True, calls=1), "short-run", name="short-run-draws").name
        'short-run-draws'
    """

    def draw(law: Any, lead: Size) -> Tensor:
        memory = getattr(law.memories.get(learned), "inner", None)
        if not isinstance(memory, Chains):
            raise Unanswerable(
                f"draws of {type(law.base).__name__}{tuple(law.event_shape)} by {name}: it goes on with the chains that the energy was "
                f"learned with by {learned}, and here it was {', '.join(law.memories) or 'not learned'}; expected "
                f"via={{site: ({learned!r}, {name!r})}} with data to learn from, or chains that need none: via={{site: 'chains'}}"
            )
        f = on_rows(law, lead if conditional(law) else Size())
        return how(f, memory, lead.numel())

    return _by(draw, name, cost, unmovable)


def generated_by(learned: Sequence[str], *, name: str, cost: float = 820.0) -> Conversion:
    """From an energy that was learned with a sampler beside it to draws of that sampler: no chains, and only as right as it is.

    Args:
        learned: conversions that leave such a sampler behind.
        name: what it is asked for by.
        cost: of one use, relative to others.

    Example:
        >>> generated_by(["amortised"], name="generator").name
        'generator'
    """

    def draw(law: Any, lead: Size) -> Tensor:
        for way in learned:
            sampler = getattr(getattr(law.memories.get(way), "inner", None), "sample", None)
            if sampler is not None:
                drawn: Tensor = sampler(lead.numel())
                return drawn
        raise Unanswerable(
            f"draws of {type(law.base).__name__}{tuple(law.event_shape)} by {name}: there is no sampler, as the energy was learned by "
            f"{', '.join(law.memories) or 'nothing'}; expected via={{site: ({learned[0]!r}, {name!r})}} with data to learn from"
        )

    return _by(draw, name, cost, unmovable)


def _by(draw: Callable[[Any, Size], Tensor], name: str, cost: float, unless: Unless) -> Conversion:
    """The conversion of a way to draw: from a law and the shape of its batch and samples to values `[shape.numel(), *event]`."""

    def methods(law: Any) -> Methods:
        @torch.no_grad()
        def sample(sample_shape: Any = Size()) -> Tensor:
            """Draws, `[*sample_shape, *batch_shape, *event_shape]`."""
            lead = Size(sample_shape) + law.batch_shape
            try:
                return draw(law, lead).reshape(lead + law.event_shape)
            except (ValueError, RuntimeError) as error:
                told = f"draws of {type(law.base).__name__}{tuple(law.event_shape)} by {name}: {error}"
                raise Unanswerable(told) from error

        return {"sample": sample}

    return Conversion(name, _DENSITY, Capability.SAMPLE, Exactness.ESTIMATE, cost, methods, unless=unless)


def _unless(how: LongRun | AdaptedRun) -> Unless:
    def unless(site: Any, structure: Any) -> str | None:
        why = unmovable(site, structure)
        if why is not None:
            return why
        space = space_of(site)
        measured, counted = space.dims, len(space.cardinalities)
        kernel = how.continuous if isinstance(how, LongRun) else how.kernel
        if isinstance(how, AdaptedRun) and counted:
            return (
                f"{type(kernel).__name__} moves measured numbers alone, and {counted} here are counted; "
                + ("hmc, mala and random-walk move both" if measured else _COUNTED)
            )
        if kernel is not None and not measured:
            return f"{type(kernel).__name__} moves measured numbers, and here all {counted} are counted; {_COUNTED}"
        if isinstance(how, LongRun) and how.discrete is not None and not counted:
            named = how.discrete if isinstance(how.discrete, type) else type(how.discrete)
            return (
                f"{named.__name__} moves counted numbers, and here all {measured} are measured; mala, hmc, nuts, chees, meads and "
                "random-walk move these"
            )
        return None

    return unless


_COUNTED = "gibbs, gibbs-with-gradients and discrete-langevin move these"

_LONG: dict[str, LongRun | AdaptedRun] = {
    "mala": LongRun(continuous=MALA(), leaps=0),
    "hmc": LongRun(continuous=HMC(), leaps=0, steps=1, warmup=100, thin=10),
    "random-walk": LongRun(continuous=RandomWalk(), leaps=0, steps=10),
    "ula": LongRun(continuous=ULA(), leaps=0, steps=10, step_size=0.1),
    "nuts": AdaptedRun(NUTS()),
    "chees": AdaptedRun(ChEES()),
    "meads": AdaptedRun(MEADS(), warmup=400, thin=40),
    "gibbs": LongRun(discrete=Gibbs, leaps=0, warmup=60, thin=10),
    "gibbs-with-gradients": LongRun(discrete=GibbsWithGradients, leaps=0, steps=4),
    "discrete-langevin": LongRun(discrete=DiscreteLangevin, leaps=0, steps=2),
}

CONVERSIONS: tuple[Conversion, ...] = (
    drawn_by(LongRun()),
    *(drawn_by(how, name=name, cost=510.0 + i) for i, (name, how) in enumerate(_LONG.items())),
    tempered_by(AnnealedRun(), name="annealed", cost=700.0),
    tempered_by(TemperedRun(), name="parallel-tempering", cost=750.0),
    continued_by(Continued(from_noise=True, calls=1), "short-run", name="short-run-draws", cost=800.0),
    generated_by(("amortised", "cooperative"), name="generator", cost=820.0),
    continued_by(Continued(), "persistent-contrastive-divergence", name="persistent-chains", cost=810.0),
)


@hookimpl
def pgen_conversions() -> list[Conversion]:
    """The conversions, for the registry."""
    return list(CONVERSIONS)
