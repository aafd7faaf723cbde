"""The exact backend: its options, what it offers, and how a fit goes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor

from pgen.algorithms.factor_graph import MAX_TABLE
from pgen.backends.exact.answers import Integrated
from pgen.backends.exact.climb import maximise
from pgen.backends.exact.groups import Group, groups_of
from pgen.backends.exact.mode import Mode, examine_mode, fit_mode
from pgen.backends.exact.solution import Solution
from pgen.capability import Capability, Exactness, Offer, Query, Rank, Refusal
from pgen.choice import Paths, drawing, learned_factor, names_of, require
from pgen.conversion import exactness_of
from pgen.errors import OptionError
from pgen.isolation import validating
from pgen.parameters import Parameters
from pgen.problem import Problem
from pgen.registry import hookimpl
from pgen.run import Player, Run, Step
from pgen.structure import Structure


@dataclass(frozen=True)
class Exact:
    r"""Maximum likelihood with every latent summed or integrated out exactly.

    What is maximised is $\log p_\theta(x) = \log \int p_\theta(x, z)\, dz$, and it is exact because the
    latents are, group by group of those that depend on each other,

    - absent: fully observed programs (autoregressive models, flows, regressions);
    - finite: mixtures, hidden Markov models, Bayesian networks, summed by variable elimination;
    - jointly Gaussian: factor analysis, linear regression, Kalman chains, hierarchies;
    - conjugate: one latent each (beta, gamma, Dirichlet, ...).

    Where the run leaves it open how to learn, a small problem is taken to its maximum by L-BFGS on all rows;
    others, and runs that say how, take steps as `Run` has it.

    That a group is Gaussian or conjugate is settled by numbers when the program is fitted, before and
    after: a program that only looks so is refused.

    Attributes:
        estimate: `"marginal"`, or `"map"`: continuous latents are not integrated out but set to their most
            probable values, jointly with the learned tensors (finite ones are still summed out). The values
            are in `fitted.parameters` under the names of the sites, and only `sample` is answered.
        max_table: most numbers that one table may hold.
        via: conversions to go through, by site.

    Example:
        >>> Exact(estimate="mean")
        Traceback (most recent call last):
            ...
        pgen.errors.OptionError: Exact(estimate='mean'): expected 'marginal' or 'map'

    References:
        Obermeyer et al. (ICML 2019) for finite latents; see `pgen.algorithms` for the rest.
    """

    name: ClassVar[str] = "exact"

    estimate: Literal["marginal", "map"] = "marginal"
    max_table: int = MAX_TABLE
    via: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check every field."""
        if self.estimate not in ("marginal", "map"):
            raise OptionError(f"Exact(estimate={self.estimate!r}): expected 'marginal' or 'map'")
        if not isinstance(self.max_table, int) or self.max_table < 1:
            raise OptionError(
                f"Exact(max_table={self.max_table!r}): expected a positive number of table entries"
            )

    def examine(self, structure: Structure) -> Offer | Refusal:
        """Say what can be had exactly, or which site stands in the way."""
        for refusal in (learned_factor(structure), _subsampled(structure)):
            if refusal is not None:
                return refusal
        paths = require(structure, (Capability.LOG_PROB,), (Capability.LOG_PROB,), self.via)
        if isinstance(paths, Refusal):
            return paths
        bounded = _bounded(paths) if self.estimate == "marginal" else frozenset[str]()
        for site, path in paths.items():
            if exactness_of(path) is Exactness.EXACT or _bounds_evidence(structure, site, bounded):
                continue
            steps = " -> ".join(c.name for c in path)
            why = (
                f"the log probability of {site!r} is reached by {steps}, which is {exactness_of(path).value}"
            )
            return Refusal(site, "an exact log_prob", why)
        if self.estimate == "map":
            return examine_mode(structure, paths)
        groups = groups_of(structure, structure.evidenced, self.max_table)
        if isinstance(groups, Refusal):
            return groups
        exact = Exactness.EXACT
        answers = {Query.LOG_PROB: Exactness.LOWER_BOUND if bounded else exact}
        if structure.factors:
            answers[Query.LOG_PROB] = Exactness.UNNORMALIZED
        drawn = None if structure.factors else drawing(structure, paths)
        if drawn is not None:
            answers[Query.SAMPLE] = drawn[1]
        if (structure.latents or len(structure.observed) > 1) and not bounded:
            answers |= {Query.POSTERIOR: exact, Query.MARGINALS: exact}
        certain = all(group.method in ("finite", "gaussian") for group in groups)
        rank = Rank.IDEAL if certain and not bounded else Rank.POSSIBLE
        return Offer(answers, rank, _why(groups) + _caveat(bounded), names_of(drawn[0] if drawn else paths))

    def fit(self, problem: Problem, structure: Structure, run: Run) -> Integrated | Mode:
        """Maximise the evidence of the data in the learned tensors, if there are any."""
        parameters = Parameters.of(problem)
        if self.estimate == "map":
            return fit_mode(problem, structure, parameters, run, self.max_table)
        paths = require(structure, (Capability.LOG_PROB,), (Capability.LOG_PROB,), self.via)
        bounded = frozenset() if isinstance(paths, Refusal) else _bounded(paths)
        answers = Integrated(problem, structure, parameters, self.max_table, bounded)
        apart = answers.prove()
        groups = answers.groups(structure, structure.evidenced)
        count = problem.rows or 1

        def loss(batch: Problem, step: Step) -> tuple[Tensor, Mapping[str, float | Tensor]]:
            # Validation doubles the cost of a step; data and program were checked before the first.
            with parameters.installed(step.training), validating(step.first):
                solution = Solution.of(batch, structure, groups, max_table=self.max_table, apart=apart)
                return -solution.evidence().sum() / (batch.rows or count), {}

        # Rows that share a latent have one evidence, which no batch of them can estimate.
        learned = problem.whole() if structure.tied else problem
        player = Player(parameters.tensors, loss)
        answers.history = maximise(player, learned, structure, run, parameters.buffers)
        if parameters.tensors:
            answers.prove()
        return answers


def _bounded(paths: Paths) -> frozenset[str]:
    """The sites that have a lower bound in the place of a log probability."""
    return frozenset(site for site, path in paths.items() if exactness_of(path) is Exactness.LOWER_BOUND)


def _bounds_evidence(structure: Structure, site: str, bounded: Collection[str]) -> bool:
    """Whether a bound at a site bounds the evidence: sums over finite latents keep the order."""
    return site in bounded and structure.sites[site].observed and not structure.factors


def _subsampled(structure: Structure) -> Refusal | None:
    for plate in structure.plates.values():
        if plate.subsampled:
            inside = next(s.name for s in structure if plate.name in s.plates)
            why = f"plate {plate.name!r} subsamples; leave batching to the run: Run(batch_size=...)"
            return Refusal(inside, "all rows of its plate", why)
    return None


def _caveat(bounded: Collection[str]) -> str:
    return f"; {', '.join(sorted(bounded))} bounded from below" if bounded else ""


def _why(groups: list[Group]) -> str:
    if not groups:
        return "no latent bears on the data: the likelihood is the program's own"
    said = []
    for method, phrase in (
        ("finite", "{} summed out"),
        ("gaussian", "{} jointly Gaussian, as far as trial runs tell (proved when fitted)"),
        ("conjugate", "{} conjugate, if the likelihood has that form (settled when fitted)"),
    ):
        names = [name for group in groups if group.method == method for name in group.latents]
        if names:
            listed = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
            said.append(phrase.format(listed))
    return "; ".join(said)


@hookimpl
def pgen_backends() -> list[type[Exact]]:
    """The exact backend."""
    return [Exact]
