"""What the options of the score backend stand for, and which of them can be."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from pgen.algorithms.diffusion import grids, times, weightings
from pgen.algorithms.diffusion.schedules import RectifiedFlow, Schedule
from pgen.algorithms.diffusion.solvers import SOLVERS, UniPC
from pgen.backends.score.consistency import GRIDS as JUMPS
from pgen.backends.score.consistency import Jumping, require_consistent
from pgen.backends.score.inference import KINDS
from pgen.distributions.denoising import Bounded, Flowing, Grid, Reversed
from pgen.errors import OptionError
from pgen.guides.families import FAMILIES

WEIGHTINGS: Mapping[str, Callable[[Schedule, float], weightings.Weighting]] = {
    "uniform": lambda schedule, data: weightings.Uniform(),
    "edm": lambda schedule, data: weightings.EDM(data),
    "flow": lambda schedule, data: weightings.FlowMatching(),
    "v": lambda schedule, data: weightings.V(),
    "min-snr": lambda schedule, data: weightings.MinSNR(),
    "soft-min-snr": lambda schedule, data: weightings.SoftMinSNR(),
    "likelihood": lambda schedule, data: weightings.Likelihood(schedule),
}
"""Weights of squared errors by noise level, from a schedule and the standard deviation of the data."""

TIMES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "low-discrepancy": lambda u: times.lattice(u[0], len(u)) if len(u) else u,
    "antithetic": lambda u: times.antithetic(u[: (len(u) + 1) // 2])[: len(u)],
    "uniform": lambda u: u,
    "importance": lambda u: times.lattice(u[0], len(u)) if len(u) else u,
}
"""How the quantiles of a batch's noise levels are spread, out of uniform numbers."""

GRIDS: Mapping[str, Grid] = {"karras": grids.karras, "log-snr": grids.log_snr}

_STEPS, _JUMPS = 32, 2
_DATA = 0.5  # standard deviation of the data, for weights that ask: of the order of 1


def check(options: Any) -> None:
    """Check every field of a `Score`.

    Raises:
        OptionError: one is what it cannot be; the message names it, and what was expected.
    """
    one_of(options, "loss", ("denoising", "sliced", "consistency"))
    if not callable(options.weighting):
        one_of(options, "weighting", ("auto", "learned", *WEIGHTINGS), "or a callable of noise levels")
    one_of(options, "times", tuple(TIMES))
    one_of(options, "coupling", ("independent", "optimal-transport"))
    if options.solver != "auto" and not hasattr(options.solver, "step"):
        one_of(options, "solver", tuple(SOLVERS), "or an object with `step`")
    if not callable(options.grid):
        one_of(options, "grid", tuple(GRIDS), "or a callable")
    one_of(options, "evaluate", ("flow", "bound"))
    one_of(options, "divergence", ("auto", "exact", "hutchinson", "hutch++"))
    one_of(options, "posterior", KINDS)
    if not callable(options.guide):
        one_of(options, "guide", ("auto",), "or a callable")
    one_of(options, "family", FAMILIES)
    least_of = {"steps": 1, "probes": 2, "bound_particles": 8, "particles": 2, "levels": 2, "moves": 0}
    for option, least in least_of.items():
        value = getattr(options, option)
        if value is None and option in ("steps", "particles", "levels"):
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise wrong(options, option, f"a whole number of at least {least}")
    for option, most in {"condition_dropout": 1, "guidance": math.inf, "tolerance": 1, "ema": 1}.items():
        value = getattr(options, option)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= most:
            raise wrong(options, option, f"a number from 0 to {most}")
    if options.coupling != "independent" and options.loss == "sliced":
        raise wrong(
            options,
            "coupling",
            "'independent' with loss='sliced': noise that is paired with data leaves no score",
        )
    require_consistent(options)


def one_of(options: Any, option: str, values: Sequence[str], more: str = "") -> None:
    """Check that an option has one of some values.

    Raises:
        OptionError: it has another one.
    """
    if getattr(options, option) not in values:
        raise wrong(options, option, f"one of {', '.join(map(repr, values))} {more}".rstrip())


def wrong(options: Any, option: str, expected: str) -> OptionError:
    """What to say of a value that an option cannot have."""
    return OptionError(f"Score({option}={getattr(options, option)!r}): expected {expected}")


def weights(options: Any) -> Callable[[Schedule], weightings.Weighting]:
    """The weighting, for each schedule."""
    chosen = options.weighting
    if callable(chosen):
        return lambda schedule: chosen
    if chosen in ("auto", "learned"):
        return _usual
    return partial(_weight, WEIGHTINGS[chosen])


def drawing(options: Any) -> Reversed | Jumping:
    """How sites with a denoiser are drawn."""
    solver: Any = options.solver
    if options.loss == "consistency":
        grid = options.grid if callable(options.grid) else JUMPS[options.grid]
        return Jumping(options.steps or _JUMPS, grid, None if isinstance(solver, str) else solver)
    if solver == "auto":
        solver = UniPC(3, variable="sigma")
    elif isinstance(solver, str):
        solver = SOLVERS[solver]()
    grid = options.grid if callable(options.grid) else GRIDS[options.grid]
    return Reversed(solver, options.steps or _STEPS, grid)


def weighing(options: Any) -> Flowing | Bounded:
    """How sites with a denoiser are weighed."""
    if options.evaluate == "bound":
        return Bounded(options.bound_particles)
    return Flowing(options.divergence, options.probes, options.tolerance)


def _weight(
    made: Callable[[Schedule, float], weightings.Weighting], schedule: Schedule
) -> weightings.Weighting:
    return made(schedule, _DATA)


def _usual(schedule: Schedule) -> weightings.Weighting:
    """The weighting that goes with a schedule: of the velocity for straight paths, else of what is preconditioned.

    Weights of the predicted noise alone leave large noise unlearned: log densities of a trained mixture in the plane are
    then off by two to three times as much.
    """
    return weightings.FlowMatching() if isinstance(schedule, RectifiedFlow) else weightings.EDM(_DATA)
