"""The score backend: its options, what it offers, and how a fit goes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from pgen.algorithms.diffusion import weightings
from pgen.algorithms.diffusion.solvers import Solver
from pgen.algorithms.diffusion.times import Importance
from pgen.backends.score import joint, options
from pgen.backends.score.answers import Denoised
from pgen.backends.score.consistency import Ends, Teacher, refused
from pgen.backends.score.inference import Inference, Kind
from pgen.backends.score.needs import FLOW, Needs, needs, offer
from pgen.backends.score.training import Objective, loss_of
from pgen.capability import Capability, Offer, Refusal
from pgen.distributions.denoising import Grid
from pgen.errors import ProgramError
from pgen.fitted import Fitted
from pgen.guides.families import Family
from pgen.guides.proposal import Proposal, automatic, users
from pgen.isolation import validating
from pgen.parameters import Parameters
from pgen.problem import Problem
from pgen.registry import hookimpl
from pgen.run import Player, Run, Step
from pgen.structure import Structure

_SMALL = 16  # numbers of an event that a step is so cheap for that many can be taken
_SMALL_STEPS, _SMALL_BATCH, _SMALL_LR = 10_000, 1024, 2e-3

Loss = Callable[[Problem, Step], tuple[Tensor, Mapping[str, float | Tensor]]]


@dataclass(frozen=True)
class Score:
    r"""Learn denoisers by score matching; draw, weigh and condition by the equations that run noise back into data.

    A site with a denoiser (`pgen.distributions.Diffusion`) that is observed is trained by

    .. math:: \mathbb{E}\; w(\sigma)\, \| x - D_\theta(x + \sigma \varepsilon, \sigma) \|^2,

    whose minimum is :math:`E[x_0 | x]`, and with it the score at every noise level. All other observed sites are trained
    by their log probabilities. Sites with a denoiser that are latent are inferred from what is observed elsewhere; where
    something is to be learned beside them (a diffusion of latents, a decoder), a guide that is learned with it draws
    them, and the evidence is bounded from below (see `pgen.backends.score.joint`).

    Attributes:
        loss: `"denoising"`, or `"sliced"`: sliced score matching of the noisy values, which needs second derivatives; or
            `"consistency"`: networks learn where the paths from noise end, to draw in 1 to 4 steps. They are no denoisers
            then: no density and no posterior is offered. Networks with dropout do better without it here.
        teacher: a fit of a program with the same sites by denoisers, whose paths (with its guidance) are what
            `loss="consistency"` learns, starting from its tensors; None: the paths of the data. It is not saved.
        weighting: w: `"uniform"` (in the predicted noise), `"edm"`, `"flow"` (in the velocity: flow matching), `"v"`,
            `"min-snr"`, `"soft-min-snr"`, `"likelihood"`; `"learned"`: such that every noise level counts the same, by a
            learned variance; `"auto"`: `"flow"` for `RectifiedFlow`, else `"edm"`; for latents the bound
            itself, where no other option (`loss`, `times`, `condition_dropout`) asks for a loss of their own.
            Or a callable from noise levels to weights.
        times: how noise levels are spread over the rows of a batch: `"low-discrepancy"`, `"antithetic"`, `"uniform"`,
            or `"importance"`: drawn where losses are large.
        coupling: `"independent"`, or `"optimal-transport"`: noise is paired with data within a batch, for straighter
            paths. The denoiser is no score then, so that draws follow the probability flow and no density is offered.
        condition_dropout: share of the rows whose condition is left out (NaN), to learn the law without it too.
        guidance: strength of classifier-free guidance of draws under a condition; 1 is none.
        solver: takes the steps from noise to data: a name, or an object with `step(x, t, t_next, fn)`.
        steps: how many; None: 32, or 2 with `loss="consistency"`.
        grid: noise levels: `"karras"`, `"log-snr"`, or a callable of steps, least and largest level.
        evaluate: `log_prob` of a diffusion solves the probability flow (`"flow"`, an estimate), or is a variational lower
            bound (`"bound"`).
        divergence: of the probability flow: `"exact"`, `"hutchinson"`, `"hutch++"`; `"auto"`: exact where that is cheap.
        probes: random directions for each stochastic divergence.
        tolerance: of the solver of the probability flow.
        bound_particles: evaluations for each row for the bound; where a guide was learned, its draws.
        posterior: how latents are drawn given data. `"exact"`: by the denoiser's own posterior given linear-Gaussian
            observations, where it has a method for it (`MixtureDenoiser` has: see
            `pgen.algorithms.diffusion.posteriors.Conjugate`); `"tds"`: twisted particles and then Metropolis moves,
            exact with many particles and levels, for any likelihood; `"mmps"`, `"pigdm"`, `"ddrm"`: approximations for
            linear-Gaussian observations; `"replacement"`, `"repaint"`: for those of single elements, which are put in as
            they were seen, their noise not counted; `"dps"`, `"lgd"`: for any differentiable likelihood; `"split-gibbs"`;
            `"guide"`: by the guide, where one was learned. `"auto"`: `"guide"` there, `"exact"` where it can be, else
            `"tds"`. A condition counts `guidance` times, in evidences once.
        particles: for each row, at least; None: from 512 to 8192, fewer where the denoiser takes much work.
        levels: noise levels from noise to a posterior draw; None: 100, or 256 where the denoiser takes little work,
            and up to 1600 for rows that lose their particles.
        moves: Metropolis moves at the end, along scores at the least noise level where these can be trusted; none where
            they cannot, as those of most learned denoisers cannot.
        guide: what draws latents while the rest is learned: `"auto"`, made from the program, or a callable or module of
            your own, which is given data by name (its arguments name keys of the data, `n` is the number of rows),
            otherwise what the program is called with.
        family: of the laws that a guide made from the program gives: `"normal"`, `"low-rank"`, `"full"`, `"flow"`.
        ema: the average of the parameters that is kept, where the run does not say: its half-life as a share of the steps.
        via: conversions to go through, by site.

    Example:
        >>> Score(weighting="edm", steps=18).steps
        18
        >>> Score(solver="eular")
        Traceback (most recent call last):
            ...
        pgen.errors.OptionError: Score(solver='eular'): expected one of 'euler', 'ddim', ... or an object with `step`

    A run that does not say how many steps there are takes 10,000 of 1,024 rows, at a rate of 2e-3, where diffusions have up
    to 16 numbers and are observed: a minute of one core for a `DenoiserMLP`. 100,000 points in the plane then have log densities that
    are off by 0.04 to 0.05 nats on average, 20,000 by 0.06.

    References:
        Vincent (Neural Computation 2011), Song & Ermon (NeurIPS 2019), Ho et al. (NeurIPS 2020), Song et al. (ICLR 2021),
        Karras et al. (NeurIPS 2022), Lipman et al. (ICLR 2023).
    """

    name: ClassVar[str] = "score"

    loss: Literal["denoising", "sliced", "consistency"] = "denoising"
    teacher: Fitted | None = field(default=None, metadata={"saved": False})
    weighting: str | Callable[[Tensor], Tensor] = "auto"
    times: Literal["low-discrepancy", "antithetic", "uniform", "importance"] = "low-discrepancy"
    coupling: Literal["independent", "optimal-transport"] = "independent"
    condition_dropout: float = 0.0
    guidance: float = 1.0
    solver: str | Solver = "auto"
    steps: int | None = None
    grid: str | Grid = "karras"
    evaluate: Literal["flow", "bound"] = "flow"
    divergence: Literal["auto", "exact", "hutchinson", "hutch++"] = "auto"
    probes: int = 30
    tolerance: float = 1e-4
    bound_particles: int = 64
    posterior: Kind = "auto"
    particles: int | None = None
    levels: int | None = None
    moves: int = 20
    guide: Literal["auto"] | Callable[..., Any] = "auto"
    family: Family = "normal"
    ema: float = 0.02
    via: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check every field."""
        options.check(self)

    def examine(self, structure: Structure) -> Offer | Refusal:
        """Needs a denoiser at one site at least, and at every latent that data bear upon."""
        found = needs(structure, self.via, FLOW if self.evaluate == "flow" else "denoising-bound")
        if isinstance(found, Refusal):
            return found
        if found.joint and self.coupling != "independent":
            why = f"latents are weighed by the denoiser while it is learned, and coupling={self.coupling!r} leaves no score"
            return Refusal(found.inferred[0], "a score", why)
        if self.loss == "consistency":
            refusal = refused(structure, found.inferred, found.matched, self.teacher)
            if refusal is not None:
                return refusal
        scored = self.coupling == "independent" and self.loss != "consistency"
        return offer(structure, found, flow=self.evaluate == "flow", scored=scored, by=self.loss)

    def fit(self, problem: Problem, structure: Structure, run: Run) -> Denoised:
        """Learn the tensors of the program, if there are any."""
        found = needs(structure, self.via, FLOW)
        plan = _Plan.of(problem, structure, Needs({}, (), ()) if isinstance(found, Refusal) else found)
        learned = weightings.LearnedVariance() if self.weighting == "learned" and plan.trained else None
        proposal = self._proposal(plan) if plan.drawn else None
        parameters = plan.parameters(proposal, {} if learned is None else {"weighting": learned})
        guided = None if proposal is None else joint.Guided(proposal, plan.drawn, self.bound_particles)
        answers = Denoised(
            problem,
            structure,
            parameters,
            options.drawing(self),
            options.weighing(self),
            Inference(self.posterior, self.particles, self.levels, self.moves, adapt=self.levels is None),
            self.guidance,
            self.via,
            guided,
        )
        own = [name for name in parameters.tensors if learned is None or not name.startswith("weighting.")]
        if own and structure.observed:
            inner = self._loss(plan, parameters, proposal, learned)

            def loss(batch: Problem, step: Step) -> tuple[Tensor, Mapping[str, float | Tensor]]:
                with validating(step.first):
                    return inner(batch, step)

            player = Player(parameters.tensors, loss, within=lambda step: parameters.installed(step.training))
            answers.history = self._run(plan, run).optimize(
                {"program": player}, plan.bare, buffers=parameters.buffers
            )
        return answers

    def _loss(
        self,
        plan: _Plan,
        parameters: Parameters,
        proposal: Proposal | None,
        learned: weightings.LearnedVariance | None,
    ) -> Loss:
        """What is minimised; its running means go into the buffers."""
        histograms = (
            {name: Importance.start() for name in plan.trained} if self.times == "importance" else None
        )
        for name, histogram in (histograms or {}).items():
            parameters.buffers |= {
                f"times.{name}.square": histogram.square,
                f"times.{name}.mass": histogram.mass,
            }
        spread, rows = options.TIMES[self.times], plan.bare.rows or 1
        if self.loss == "consistency":
            teacher = None if self.teacher is None else Teacher.of(self.teacher)
            if teacher is not None:
                teacher.begin(parameters.tensors)
            ends = Ends(spread, teacher, histograms, self.condition_dropout)
            return loss_of(ends, plan.matched, plan.weighed, rows)
        objective = Objective(
            options.weights(self),
            spread,
            learned,
            histograms,
            slices=1 if self.loss == "sliced" else 0,
            coupled=self.coupling == "optimal-transport",
            dropout=self.condition_dropout,
        )
        apart = loss_of(objective, plan.matched, plan.weighed, rows)
        if proposal is None:
            return apart
        own_weights = (  # or anything else that the bound alone could not follow
            self.weighting not in ("auto", "likelihood")
            or self.loss == "sliced"
            or self.condition_dropout > 0
            or self.times != "low-discrepancy"
        )
        return joint.loss_of(
            objective if own_weights else None,
            proposal,
            parameters,
            plan.structure,
            apart if plan.matched or plan.weighed else None,
            rows,
        )

    def _run(self, plan: _Plan, run: Run) -> Run:
        """The run, with what it leaves open: many steps where these are cheap, and an average of the parameters."""
        sites = plan.structure.sites
        sizes = [sites[s].event_shape.numel() for s in plan.trained]
        cheap = bool(sizes) and not plan.drawn and max(sizes) <= _SMALL
        if run.steps is None and cheap:
            batch = run.batch_size or plan.bare.suggested_batch or _SMALL_BATCH
            run = replace(
                run, steps=_SMALL_STEPS, batch_size=batch, lr=_SMALL_LR if run.lr is None else run.lr
            )
        if run.ema is None and self.ema:
            run = replace(run, ema=max(1.0, self.ema * (2000 if run.steps is None else run.steps)))
        return run

    def _proposal(self, plan: _Plan) -> Proposal:
        """The guide of the latents that data bear upon.

        Raises:
            ProgramError: the user's guide draws other sites.
        """
        if not callable(self.guide):
            left = [s for s in plan.structure.latents if s not in plan.drawn]
            return automatic("amortized", plan.bare, plan.structure, left, family=self.family)
        proposal = users(self.guide, plan.bare, plan.structure)
        if set(proposal.order) != set(plan.drawn):
            raise ProgramError(
                f"the guide {getattr(self.guide, '__name__', type(self.guide).__name__)!r} draws "
                f"{', '.join(proposal.order) or 'nothing'}; expected the latents that data bear upon: {', '.join(plan.drawn)}"
            )
        return proposal


@dataclass(frozen=True)
class _Plan:
    """What each site of a program is to a fit.

    Attributes:
        bare: the problem, its denoisers as they are.
        structure: of the program.
        matched: sites that are trained by denoising their observed values.
        drawn: latents that a guide draws.
        trained: all sites whose denoisers are trained.
        weighed: sites that are trained by their log probability, no drawn latent bearing upon them.
    """

    bare: Problem
    structure: Structure
    matched: tuple[str, ...]
    drawn: tuple[str, ...]
    trained: tuple[str, ...]
    weighed: tuple[str, ...]

    @staticmethod
    def of(problem: Problem, structure: Structure, found: Needs) -> _Plan:
        """That of a program whose needs are met."""
        able = [s.name for s in structure if Capability.DENOISER in s.capabilities]
        bare = replace(problem, adapters={k: v for k, v in problem.adapters.items() if k not in able})
        sites = joint.Sites.of(structure) if found.joint else joint.Sites((), (), ())
        matched = tuple(s for s in found.matched if s not in sites.denoised)
        served = (*matched, *sites.denoised, *sites.weighed)
        weighed = tuple(s for s in structure.observed if s not in served)
        return _Plan(bare, structure, matched, sites.drawn, (*matched, *sites.denoised), weighed)

    def parameters(self, proposal: Proposal | None, owners: Mapping[str, object]) -> Parameters:
        """The learned tensors of program, guide and further owners."""
        if proposal is None:
            return Parameters.of(self.bare, owners=owners)
        few = self.bare
        if few.rows is not None and not proposal.fixed:
            few = few.take(torch.arange(min(few.rows, 4)))
        guide = proposal.guide
        return Parameters.of(
            few, owners={**owners, "guide": proposal.owner}, run=lambda: (guide(few)(), few())
        )


@hookimpl
def pgen_backends() -> list[type[Score]]:
    """The backend, for the registry."""
    return [Score]
