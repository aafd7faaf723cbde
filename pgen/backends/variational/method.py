"""The variational backend: its options, what it needs of a program, and how a fit goes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch

from pgen.backends.variational.answers import Posterior
from pgen.backends.variational.joint import Coupling
from pgen.backends.variational.needs import needs, offer, summable
from pgen.backends.variational.players import Players, Terms
from pgen.backends.variational.settle import couple, settle, unsummable
from pgen.backends.variational.simulate import as_observed, dreams
from pgen.capability import Offer, Refusal
from pgen.choice import answering, refusal_text
from pgen.conversion import exactness_of
from pgen.errors import OptionError, ProgramError, Refused
from pgen.guides.families import FAMILIES, Family
from pgen.guides.proposal import Kind, Proposal, automatic, prior, users
from pgen.learning import watched
from pgen.parameters import Parameters
from pgen.problem import Problem
from pgen.registry import hookimpl
from pgen.run import Run
from pgen.structure import Structure

OBJECTIVES = ("elbo", "iwae", "dreg", "renyi", "wake-sleep", "forward-kl")
GUIDES = ("auto", "amortized", "mean-field", "full-rank", "low-rank", "flow")
_SEVERAL = 8  # particles, unless told otherwise, where several are of use
_DRAWS = 64  # draws per step that make a steady gradient of the ELBO
_BATCH = 128


@dataclass(frozen=True)
class Variational:
    r"""Fit a program and a guide together, by a bound on the evidence of the data.

    Attributes:
        objective: what is maximised.
            `"elbo"`: $E_q[\log p(x, z) - \log q(z | x)]$, divergences in closed form where they are known.
            `"iwae"`: $E[\log \frac1K \sum_k w_k]$. `"dreg"`: the same bound, with the doubly reparameterised
            gradient of the guide. `"renyi"`: the bound of order `alpha`.
            `"wake-sleep"`: reweighted wake-sleep; program and guide each have a loss of their own.
            `"forward-kl"`: the guide alone, trained on simulations of the program (neural posterior
            estimation).
        guide: `"auto"` or `"amortized"`: made from the program, its structure inverted faithfully.
            `"mean-field"`, `"full-rank"`, `"low-rank"`, `"flow"`: one joint law of all latents. Or a callable
            or module of your own: it is given data by name (its arguments name keys of the data, `n` is the
            number of rows), otherwise what the program is called with.
        family: law that an amortized guide gives a continuous latent, in unconstrained space: `"normal"`
            (elements independent), `"low-rank"`, `"full"` (correlated), `"flow"` (neural splines).
        particles: draws per row and step; None: 8, but for the ELBO as few as make 64 draws in a batch whose
            rows share no latent.
        simulations: how many simulations `"forward-kl"` learns from.
        alpha: order of the Renyi bound; 0 is the importance-weighted bound, 1 the ELBO.
        beta: weight of the divergences in the loss (ELBO only).
        warmup: fraction of the steps over which that weight rises from 0.
        free_bits: nats that each latent site may carry without being pressed (ELBO only).
        free_bits_per: `"site"`, or `"dimension"` of a site's value.
        sleep: share of the sleep phase in the guide's loss under `"wake-sleep"`, 0 to 1.
        evaluate: `log_prob` is a lower bound (`"bound"`) or an importance-weighted estimate (`"importance"`).
        evaluation_particles: draws per row for `log_prob`.
        correction: `posterior` draws from the guide (`"none"`), or resamples them by Pareto-smoothed
            importance weights and reports k-hat (`"importance"`).
        enumerate: `"auto"`: finite latents that the guide does not draw are summed out exactly. `"none"`:
            never.
        via: conversions to go through, by site.

    Example:
        >>> Variational(objective="iwae", particles=16).particles
        16
        >>> Variational(objective="elbow")
        Traceback (most recent call last):
            ...
        pgen.errors.OptionError: Variational(objective='elbow'): expected one of 'elbo', 'iwae', ...

    References:
        Kingma & Welling (ICLR 2014), Burda et al. (ICLR 2016), Tucker et al. (ICLR 2019), Li & Turner
        (NeurIPS 2016), Bornschein & Bengio (ICLR 2015), Papamakarios & Murray (NeurIPS 2016), Webb et al.
        (NeurIPS 2018).
    """

    name: ClassVar[str] = "variational"

    objective: Literal["elbo", "iwae", "dreg", "renyi", "wake-sleep", "forward-kl"] = "elbo"
    guide: Kind | Callable[..., Any] = "auto"
    family: Family = "normal"
    particles: int | None = None
    simulations: int = 10_000
    alpha: float = 0.5
    beta: float = 1.0
    warmup: float = 0.0
    free_bits: float = 0.0
    free_bits_per: Literal["site", "dimension"] = "site"
    sleep: float = 0.0
    evaluate: Literal["bound", "importance"] = "bound"
    evaluation_particles: int = 64
    correction: Literal["none", "importance"] = "none"
    enumerate: Literal["auto", "none"] = "auto"
    via: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse values that options cannot have, and options that would do nothing."""
        self._one_of("objective", OBJECTIVES)
        if not callable(self.guide):
            self._one_of("guide", GUIDES, "or a callable")
        self._one_of("family", FAMILIES)
        if self.family != "normal" and self.guide not in ("auto", "amortized"):
            raise self._wrong("family", "its default, as only guide='amortized' (or 'auto') uses it")
        self._one_of("free_bits_per", ("site", "dimension"))
        self._one_of("evaluate", ("bound", "importance"))
        self._one_of("correction", ("none", "importance"))
        self._one_of("enumerate", ("auto", "none"))
        self._whole("simulations", 1)
        self._whole("evaluation_particles", 2)
        if self.particles is not None:
            self._whole("particles", 1)
        self._number("alpha", -math.inf, math.inf)
        for option in ("beta", "free_bits"):
            self._number(option, 0, math.inf)
        for option in ("warmup", "sleep"):
            self._number(option, 0, 1)
        only = {"beta": "elbo", "warmup": "elbo", "free_bits": "elbo", "sleep": "wake-sleep"}
        for option, objective in only.items():
            if (
                self.objective != objective
                and getattr(self, option) != type(self).__dataclass_fields__[option].default
            ):
                raise self._wrong(
                    option,
                    f"its default, as only objective={objective!r} uses it (this is {self.objective!r})",
                )

    def _one_of(self, option: str, values: tuple[str, ...], more: str = "") -> None:
        if getattr(self, option) not in values:
            raise self._wrong(option, f"one of {', '.join(map(repr, values))} {more}".rstrip())

    def _whole(self, option: str, least: int) -> None:
        value = getattr(self, option)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self._wrong(option, f"a whole number of at least {least}")

    def _number(self, option: str, low: float, high: float) -> None:
        value = getattr(self, option)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            raise self._wrong(option, f"a number from {low} to {high}")

    def _wrong(self, option: str, expected: str) -> OptionError:
        return OptionError(f"Variational({option}={getattr(self, option)!r}): expected {expected}")

    def examine(self, structure: Structure) -> Offer | Refusal:
        """Needs a density at every site, and a guide for every latent that cannot be summed out."""
        found = needs(
            structure,
            self.via,
            guide=None if callable(self.guide) else self.guide,
            enumerated=self.enumerate == "auto",
            simulated=self.objective == "forward-kl",
            valued=self.objective != "elbo" or "importance" in (self.evaluate, self.correction),
        )
        if isinstance(found, Refusal):
            return found
        return offer(
            structure,
            found,
            bound=self.evaluate == "bound",
            simulated=self.objective == "forward-kl",
            via=self.via,
        )

    def fit(self, problem: Problem, structure: Structure, run: Run) -> Posterior:
        """Learn the tensors of the program and of the guide."""
        asleep = self.objective == "forward-kl"
        paths = answering(structure, self.via)
        inexact = () if isinstance(paths, Refusal) else tuple(map(exactness_of, paths.values()))
        if asleep:
            problem, structure = as_observed(problem, structure)
        proposal, summed = self._proposal(problem, structure)
        if proposal.fixed:
            problem = _all_rows(problem, run)
        few = problem if proposal.fixed else _few(problem)
        owners = {} if proposal.owner is None else {"guide": proposal.owner}
        parameters = Parameters.of(few, owners=owners, run=lambda: (proposal.guide(few)(), few()))
        with parameters.installed():
            coupling = couple(proposal, structure, summed)
            coupling = settle(coupling, few.learning, analytic=self.objective == "elbo", particles=True)
        fitted = Posterior(
            parameters,
            coupling,
            proposal,
            problem,
            self.evaluate,
            self.evaluation_particles,
            self.correction,
            inexact,
        )
        several = self._several(coupling, problem, run)
        players = Players(self._terms(coupling, several), parameters, coupling, watched(problem.learners))
        if asleep:
            with parameters.installed():
                data, loss = dreams(self.simulations, problem, coupling, proposal)
            fitted.history = run.optimize(players.asleep(few, loss), data, buffers=players.buffers)
        elif structure.observed:
            fitted.history = run.optimize(
                players.of(few.learning), problem.learning, buffers=players.buffers, default_batch=_BATCH
            )
        return fitted

    def _several(self, coupling: Coupling, problem: Problem, run: Run) -> int:
        """Particles per step: where rows are few, or share latents, more of them cost little."""
        if self.particles is not None:
            return self.particles
        if self.objective != "elbo":
            return _SEVERAL
        if not coupling.order or not coupling.vectorized:
            return 1
        rows = min(problem.rows or 1, run.batch_size or problem.suggested_batch or _BATCH)
        return _SEVERAL if coupling.shared else max(1, min(_SEVERAL, _DRAWS // rows))

    def _terms(self, coupling: Coupling, several: int) -> Terms:
        """The options that losses read, once it is known which latents are drawn without a path."""
        scored = coupling.scored[0] if coupling.scored else None
        if scored and self.objective == "dreg":
            raise OptionError(
                f"objective='dreg' follows the path of each draw, and {scored!r} is drawn without one; use "
                "objective='iwae', which gives such latents a score-function gradient"
            )
        if scored and several == 1 and self.objective in ("iwae", "renyi"):
            raise OptionError(
                f"objective={self.objective!r} with {scored!r}, which is drawn without a path, needs "
                "particles >= 2: the baseline of each is made from the others"
            )
        alpha = self.alpha if self.objective == "renyi" else 0.0
        return Terms(
            self.objective,
            several,
            alpha,
            self.beta,
            self.warmup,
            self.free_bits,
            self.free_bits_per,
            self.sleep,
        )

    def _proposal(self, problem: Problem, structure: Structure) -> tuple[Proposal, tuple[str, ...]]:
        """The guide, and the latents that are summed out beside it."""
        finite = summable(structure) if self.enumerate == "auto" else ()
        if callable(self.guide):
            proposal = users(self.guide, problem, structure)
            left = [s for s in structure.latents if s not in proposal.order]
            missing = [s for s in left if s not in finite]
            if missing:
                able = (
                    ""
                    if self.enumerate == "auto" or not structure.sites[missing[0]].enumerable
                    else ", or use enumerate='auto'"
                )
                raise ProgramError(
                    f"the guide {getattr(self.guide, '__name__', type(self.guide).__name__)!r} does not draw "
                    f"{', '.join(map(repr, missing))}, latent in {structure.name}; add "
                    f"pyro.sample({missing[0]!r}, ...) to it{able}"
                )
            return proposal, tuple(left)
        if not structure.observed:
            return prior(structure), ()
        obstacle = unsummable(_few(problem), structure, finite) if finite else None
        if obstacle is not None and len(finite) == len(structure.latents):  # an exact answer was offered
            raise Refused(
                f"backend 'variational' cannot sum out the latents of {structure.name}: "
                f"{refusal_text(obstacle)}; "
                "enumerate='none' draws them from a guide instead",
                obstacle,
            )
        summed = () if obstacle is not None else tuple(finite)
        if len(summed) == len(structure.latents):
            return replace(prior(structure), order=(), guide=lambda problem: lambda: None), summed
        pooled = self.objective == "forward-kl"
        return automatic(self.guide, problem, structure, summed, pooled=pooled, family=self.family), summed


def _all_rows(problem: Problem, run: Run) -> Problem:
    """The problem, its rows always together: the guide has a law of its own for each of them."""
    if run.batch_size is not None and problem.rows is not None and run.batch_size < problem.rows:
        raise OptionError(
            f"Run(batch_size={run.batch_size}): the guide has a law of its own for each of the "
            f"{problem.rows} rows, so that they always go together; use guide='amortized', which serves any "
            "rows, or leave batch_size out"
        )
    return replace(problem, suggested_batch=problem.rows)


def _few(problem: Problem) -> Problem:
    """Some rows, to try things on."""
    return problem if problem.rows is None else problem.take(torch.arange(min(problem.rows, 4)))


@hookimpl
def pgen_backends() -> list[type]:
    """The backend, for the registry."""
    return [Variational]
