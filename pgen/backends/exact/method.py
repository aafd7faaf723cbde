"""The exact backend: its options, what it offers, and how a fit goes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import Tensor

from pgen.algorithms.factor_graph import MAX_TABLE
from pgen.backends.exact.answers import Integrated
from pgen.backends.exact.climb import maximise
from pgen.backends.exact.groups import Group, groups_of
from pgen.backends.exact.mode import Mode, examine_mode, fit_mode
from pgen.backends.exact.solution import Solution
from pgen.capability import Capability, Exactness, Offer, Query, Rank, Refusal
from pgen.choice import (
    Paths,
    answering,
    drawing,
    learned_factor,
    learning,
    names_of,
    undrawable,
    weakest,
)
from pgen.conversion import exactness_of
from pgen.errors import OptionError
from pgen.isolation import validating
from pgen.learning import watched
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

    - absent: fully observed programs (autoregressive models, flows, regressions, energies);
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
        via: conversions to go through, by site: names, or conversions, one or several. An energy is learned by
            `via={"x": "noise-contrastive"}` or one of the others that `pgen.explain` names.

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
    via: Mapping[str, Any] = field(default_factory=dict)

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
        for refusal in (learned_factor(structure), _subsampled(structure), undrawable(structure, self.via)):
            if refusal is not None:
                return refusal
        paths = answering(structure, self.via)
        if isinstance(paths, Refusal):
            return paths
        learned = learning(structure, self.via, paths)
        if isinstance(learned, Refusal):
            return learned
        bounded = _bounded(paths) if self.estimate == "marginal" else frozenset[str]()
        if self.estimate == "marginal":  # what no data bear upon integrates to one: nothing is learned there
            barren = set(structure.latents) - structure.evidenced
            learned = {site: path for site, path in learned.items() if site not in barren}
        else:
            barren = set[str]()
        for site, path in {**paths, **learned}.items():
            if site in barren:
                continue
            if exactness_of(path) is Exactness.EXACT or _bounds_evidence(structure, site, bounded):
                continue
            if exactness_of(path) is not Exactness.LOWER_BOUND and self._learnable(structure, site):
                continue
            steps = " -> ".join(c.name for c in path)
            why = (
                f"the log probability of {site!r} is reached by {steps}, which is {exactness_of(path).value}"
            )
            return Refusal(site, "an exact log_prob", why)
        if self.estimate == "map":
            return examine_mode(structure, paths, learned)
        groups = groups_of(structure, structure.evidenced, self.max_table)
        if isinstance(groups, Refusal):
            return groups
        exact = Exactness.EXACT
        kind = weakest(_inexact(paths).values())
        answers = {Query.LOG_PROB: Exactness.UNNORMALIZED if structure.factors else kind}
        drawn = None if structure.factors else drawing(structure, paths, self.via)
        if drawn is not None:
            answers[Query.SAMPLE] = drawn[1]
        if (structure.latents or len(structure.observed) > 1) and not bounded:
            # Latents that no data bear upon are drawn as the program draws them.
            how = exact if drawn is None or not set(drawn[0]).intersection(structure.latents) else drawn[1]
            answers |= {Query.POSTERIOR: how, Query.MARGINALS: how}
        certain = all(group.method in ("finite", "gaussian") for group in groups)
        rank = Rank.IDEAL if certain and not bounded else Rank.POSSIBLE
        why = _why(groups) + _caveat(bounded, learned)
        return Offer(answers, rank, why, names_of(drawn[0] if drawn else paths), names_of(learned))

    def _learnable(self, structure: Structure, name: str) -> bool:
        """Whether what stands for a log probability at a site serves to climb a likelihood: no latent is integrated by it."""
        site = structure.sites[name]
        if Capability.DENOISER in site.capabilities:
            return False
        above = [structure.sites[p] for p in site.parents if p in structure.latents]
        if self.estimate == "map":
            return not any(s.enumerable for s in (site, *above) if not s.observed)
        return site.observed and not above

    def fit(self, problem: Problem, structure: Structure, run: Run) -> Integrated | Mode:
        """Maximise the evidence of the data in the learned tensors, if there are any."""
        parameters = Parameters.of(problem)
        if self.estimate == "map":
            return fit_mode(problem, structure, parameters, run, self.max_table)
        paths = answering(structure, self.via)
        inexact = {} if isinstance(paths, Refusal) else _inexact(paths)
        answers = Integrated(problem, structure, parameters, self.max_table, inexact)
        apart = answers.prove()
        groups = answers.groups(structure, structure.evidenced)
        count = problem.rows or 1

        def loss(batch: Problem, step: Step) -> tuple[Tensor, Mapping[str, float | Tensor]]:
            # Validation doubles the cost of a step; data and program were checked before the first.
            with validating(step.first):
                solution = Solution.of(batch, structure, groups, max_table=self.max_table, apart=apart)
                return -solution.evidence().sum() / (batch.rows or count), batch.told()

        # Rows that share a latent have one evidence, which no batch of them can estimate.
        learned = (problem.whole() if structure.tied else problem).learning
        player = Player(
            parameters.tensors,
            loss,
            watched(problem.learners),
            lambda step: parameters.installed(step.training),
        )
        if structure.observed or structure.factors:  # else there is nothing to learn from
            answers.history = maximise(player, learned, structure, run, parameters.buffers)
        if parameters.tensors:
            answers.prove()
        return answers


def _inexact(paths: Paths) -> dict[str, Exactness]:
    """How exact the log probability of a site is, for those where it is not."""
    found = {site: exactness_of(path) for site, path in paths.items()}
    return {site: kind for site, kind in found.items() if kind is not Exactness.EXACT}


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


def _caveat(bounded: Collection[str], learned: Paths) -> str:
    told = f"; {', '.join(sorted(bounded))} bounded from below" if bounded else ""
    ways = {site: path[-1] for site, path in learned.items() if path[-1].exactness is Exactness.SURROGATE}
    return told + "".join(f"; {site} learned by {way.name}" for site, way in ways.items())


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
