"""The score backend: its options, what it offers, and how a fit goes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, Literal

from torch import Tensor

from pgen.algorithms.diffusion import grids, times, weightings
from pgen.algorithms.diffusion.schedules import EDM, RectifiedFlow, Schedule
from pgen.algorithms.diffusion.solvers import SOLVERS, Solver, UniPC
from pgen.backends.score.answers import Denoised
from pgen.backends.score.needs import FLOW, needs, offer
from pgen.backends.score.posterior import KINDS, Inference, Kind
from pgen.backends.score.training import Objective, loss_of
from pgen.capability import Offer, Refusal
from pgen.distributions.denoising import Bounded, Flowing, Grid, Reversed
from pgen.errors import OptionError
from pgen.isolation import validating
from pgen.parameters import Parameters
from pgen.problem import Problem
from pgen.registry import hookimpl
from pgen.run import Player, Run, Step
from pgen.structure import Structure

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


@dataclass(frozen=True)
class Score:
    r"""Learn denoisers by score matching; draw, weigh and condition by the equations that run noise back into data.

    A site with a denoiser (`pgen.distributions.Diffusion`) that is observed is trained by

    .. math:: \mathbb{E}\; w(\sigma)\, \| x - D_\theta(x + \sigma \varepsilon, \sigma) \|^2,

    whose minimum is :math:`E[x_0 | x]`, and with it the score at every noise level. All other observed sites are trained
    by their log probabilities. Sites with a denoiser that are latent are inferred from what is observed elsewhere.

    Attributes:
        loss: `"denoising"`, or `"sliced"`: sliced score matching of the noisy values, which needs second derivatives.
        weighting: w: `"uniform"` (in the predicted noise), `"edm"`, `"flow"` (in the velocity: flow matching), `"v"`,
            `"min-snr"`, `"soft-min-snr"`, `"likelihood"`; `"learned"`: such that every noise level counts the same, by a
            learned variance; `"auto"`: what goes with the schedule: `"edm"`, `"flow"`, else `"uniform"`. Or a callable from noise levels to weights.
        times: how noise levels are spread over the rows of a batch: `"low-discrepancy"`, `"antithetic"`, `"uniform"`,
            or `"importance"`: drawn where losses are large.
        coupling: `"independent"`, or `"optimal-transport"`: noise is paired with data within a batch, for straighter
            paths. The denoiser is no score then, so that draws follow the probability flow and no density is offered.
        condition_dropout: share of the rows whose condition is left out (NaN), to learn the law without it too.
        guidance: strength of classifier-free guidance of draws under a condition; 1 is none.
        solver: takes the steps from noise to data: a name, or an object with `step(x, t, t_next, fn)`.
        steps: how many.
        grid: noise levels: `"karras"`, `"log-snr"`, or a callable of steps, least and largest level.
        evaluate: `log_prob` of a diffusion solves the probability flow (`"flow"`, an estimate), or is a variational lower
            bound (`"bound"`).
        divergence: of the probability flow: `"exact"`, `"hutchinson"`, `"hutch++"`; `"auto"`: exact where that is cheap.
        probes: random directions for each stochastic divergence.
        tolerance: of the solver of the probability flow.
        bound_particles: evaluations for each row for the bound.
        posterior: how latents are drawn given data. `"tds"`: twisted particles and then Metropolis moves,
            exact with many particles and levels, for any likelihood; `"mmps"`, `"pigdm"`, `"ddrm"`: approximations for linear-Gaussian observations;
            `"dps"`, `"lgd"`: for any differentiable likelihood; `"split-gibbs"`. `"auto"`: `"tds"`.
        particles: for each row, at least.
        levels: noise levels from noise to a posterior draw.
        moves: Metropolis moves at the end, along scores at the least noise level where these can be trusted; none where
            they cannot, as those of most learned denoisers cannot.
        ema: the average of the parameters that is kept, where the run does not say: its half-life as a share of the steps.
        via: conversions to go through, by site.

    Example:
        >>> Score(weighting="edm", steps=18).steps
        18
        >>> Score(solver="eular")
        Traceback (most recent call last):
            ...
        pgen.errors.OptionError: Score(solver='eular'): expected one of 'euler', 'ddim', ... or an object with `step`

    References:
        Vincent (Neural Computation 2011), Song & Ermon (NeurIPS 2019), Ho et al. (NeurIPS 2020), Song et al. (ICLR 2021),
        Karras et al. (NeurIPS 2022), Lipman et al. (ICLR 2023).
    """

    name: ClassVar[str] = "score"

    loss: Literal["denoising", "sliced"] = "denoising"
    weighting: str | Callable[[Tensor], Tensor] = "auto"
    times: Literal["low-discrepancy", "antithetic", "uniform", "importance"] = "low-discrepancy"
    coupling: Literal["independent", "optimal-transport"] = "independent"
    condition_dropout: float = 0.0
    guidance: float = 1.0
    solver: str | Solver = "auto"
    steps: int = 32
    grid: str | Grid = "karras"
    evaluate: Literal["flow", "bound"] = "flow"
    divergence: Literal["auto", "exact", "hutchinson", "hutch++"] = "auto"
    probes: int = 30
    tolerance: float = 1e-4
    bound_particles: int = 64
    posterior: Kind = "auto"
    particles: int = 512
    levels: int = 100
    moves: int = 20
    ema: float = 0.02
    via: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check every field."""
        self._one_of("loss", ("denoising", "sliced"))
        if not callable(self.weighting):
            self._one_of("weighting", ("auto", "learned", *WEIGHTINGS), "or a callable of noise levels")
        self._one_of("times", tuple(TIMES))
        self._one_of("coupling", ("independent", "optimal-transport"))
        if self.solver != "auto" and not hasattr(self.solver, "step"):
            self._one_of("solver", tuple(SOLVERS), "or an object with `step`")
        if not callable(self.grid):
            self._one_of("grid", tuple(GRIDS), "or a callable")
        self._one_of("evaluate", ("flow", "bound"))
        self._one_of("divergence", ("auto", "exact", "hutchinson", "hutch++"))
        self._one_of("posterior", KINDS)
        least_of = {"steps": 1, "probes": 2, "bound_particles": 8, "particles": 2, "levels": 2, "moves": 0}
        for option, least in least_of.items():
            value = getattr(self, option)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise self._wrong(option, f"a whole number of at least {least}")
        for option, low, high in (
            ("condition_dropout", 0, 1),
            ("guidance", 0, math.inf),
            ("tolerance", 0, 1),
            ("ema", 0, 1),
        ):
            value = getattr(self, option)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
                raise self._wrong(option, f"a number from {low} to {high}")
        if self.coupling != "independent" and self.loss == "sliced":
            raise self._wrong(
                "coupling", "'independent' with loss='sliced': noise that is paired with data leaves no score"
            )

    def _one_of(self, option: str, values: Sequence[str], more: str = "") -> None:
        if getattr(self, option) not in values:
            raise self._wrong(option, f"one of {', '.join(map(repr, values))} {more}".rstrip())

    def _wrong(self, option: str, expected: str) -> OptionError:
        return OptionError(f"Score({option}={getattr(self, option)!r}): expected {expected}")

    def examine(self, structure: Structure) -> Offer | Refusal:
        """Needs a denoiser at one site at least, and at every latent that data bear upon."""
        found = needs(structure, self.via, FLOW if self.evaluate == "flow" else "denoising-bound")
        if isinstance(found, Refusal):
            return found
        return offer(structure, found, flow=self.evaluate == "flow", scored=self.coupling == "independent")

    def fit(self, problem: Problem, structure: Structure, run: Run) -> Denoised:
        """Learn the tensors of the program, if there are any."""
        found = needs(structure, self.via, FLOW)
        matched = () if isinstance(found, Refusal) else found.matched
        learned = weightings.LearnedVariance() if self.weighting == "learned" and matched else None
        parameters = Parameters.of(problem, owners={} if learned is None else {"weighting": learned})
        histograms = (
            {name: times.Importance.start() for name in matched} if self.times == "importance" else None
        )
        for name, histogram in (histograms or {}).items():
            parameters.buffers |= {
                f"times.{name}.square": histogram.square,
                f"times.{name}.mass": histogram.mass,
            }
        objective = Objective(
            self._weights(),
            TIMES[self.times],
            learned,
            histograms,
            slices=1 if self.loss == "sliced" else 0,
            coupled=self.coupling == "optimal-transport",
            dropout=self.condition_dropout,
        )
        weighed = tuple(s for s in structure.observed if s not in matched)
        bare = replace(problem, adapters={k: v for k, v in problem.adapters.items() if k not in matched})
        answers = Denoised(
            problem,
            structure,
            parameters,
            self._reversed(),
            self._evaluated(),
            Inference(self.posterior, self.particles, self.levels, self.moves),
            self.guidance,
            self.via,
        )
        own = [name for name in parameters.tensors if learned is None or not name.startswith("weighting.")]
        if own and structure.observed:
            inner = loss_of(objective, matched, weighed, problem.rows or 1)

            def loss(batch: Problem, step: Step) -> tuple[Tensor, Mapping[str, float | Tensor]]:
                with parameters.installed(step.training), validating(step.first):
                    return inner(batch, step)

            if run.ema is None and self.ema:
                steps = 2000 if run.steps is None else run.steps
                run = replace(run, ema=max(1.0, self.ema * steps))
            player = Player(parameters.tensors, loss)
            answers.history = run.optimize({"program": player}, bare, buffers=parameters.buffers)
        return answers

    def _weights(self) -> Callable[[Schedule], weightings.Weighting]:
        chosen = self.weighting
        if callable(chosen):
            return lambda schedule: chosen
        if chosen in ("auto", "learned"):
            return _usual
        return partial(_weight, WEIGHTINGS[chosen])

    def _reversed(self) -> Reversed:
        solver: Any = self.solver
        if solver == "auto":
            solver = UniPC(3, variable="sigma")
        elif isinstance(solver, str):
            solver = SOLVERS[solver]()
        grid = self.grid if callable(self.grid) else GRIDS[self.grid]
        return Reversed(solver, self.steps, grid)

    def _evaluated(self) -> Flowing | Bounded:
        if self.evaluate == "bound":
            return Bounded(self.bound_particles)
        return Flowing(self.divergence, self.probes, self.tolerance)


_DATA = 0.5  # standard deviation of the data, for weights that ask: of the order of 1


def _weight(
    made: Callable[[Schedule, float], weightings.Weighting], schedule: Schedule
) -> weightings.Weighting:
    return made(schedule, _DATA)


def _usual(schedule: Schedule) -> weightings.Weighting:
    """The weighting that goes with a schedule: what its authors' networks predict, with a plain square loss."""
    if isinstance(schedule, RectifiedFlow):
        return weightings.FlowMatching()
    return weightings.EDM(_DATA) if isinstance(schedule, EDM) else weightings.Uniform()


@hookimpl
def pgen_backends() -> list[type[Score]]:
    """The backend, for the registry."""
    return [Score]
