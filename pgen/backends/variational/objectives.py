"""Objectives: from the sitewise terms of guide and program to a loss in nats per row, and metrics beside it.

Terms inside the plate of the rows are averaged over the rows of a batch; those outside it, which belong to
all N rows, are divided by N. So the loss of a batch, and its gradient, is right in the mean for the loss on
all rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pgen.algorithms import bounds, estimators
from pgen.algorithms.bounds import Bound
from pgen.algorithms.estimators import Term
from pgen.backends.variational.joint import PARTICLES, Coupling, Lane
from pgen.errors import OptionError
from pgen.guides.statements import Node, Nodes
from pgen.problem import Problem

Loss = tuple[Tensor, Mapping[str, float | Tensor]]


@dataclass(frozen=True)
class Shares:
    """What terms count for in a loss per row: those inside the plate of the rows, those outside it."""

    local: float
    shared: float
    rows: str | None

    @staticmethod
    def of(problem: Problem, rows: str | None) -> Shares:
        """Of a batch."""
        return Shares(1 / (problem.rows or 1), 1 / (problem.total or problem.rows or 1), rows)

    def __call__(self, term: Term) -> float:
        """The factor of one term."""
        return self.local if self.rows in term.dims else self.shared

    def mean(self, term: Term) -> Tensor:
        """What one term adds to the loss per row, averaged over particles."""
        return term.value.sum() * (self(term) / _particles(term))


@dataclass(frozen=True)
class Regularizer:
    """What weighs on the divergences of the latents in the loss, never in the reported bound.

    Attributes:
        beta: factor of every divergence.
        floor: nats that a group may carry for free: of its mean divergence per row for local latents.
        per: what a group is, a latent site or one dimension of its value.
    """

    beta: float | Tensor = 1.0
    floor: float = 0.0
    per: Literal["site", "dimension"] = "site"


@dataclass(frozen=True)
class Baselines:
    """Moving averages of past costs, one per site drawn without a path; used where there is one particle."""

    averages: dict[str, Tensor] = field(default_factory=dict)

    def before(self, site: str, cost: Tensor) -> Tensor:
        """The average of the site's earlier costs; this step's is taken in for the next."""
        average = self.averages[site]
        earlier = average.clone()
        average.copy_(estimators.moving_average(average, cost))
        return earlier


# --- the ELBO ---------------------------------------------------------------------------------------------


def elbo(
    coupling: Coupling,
    problem: Problem,
    lanes: Sequence[Lane],
    regularizer: Regularizer,
    baselines: Baselines | None = None,
) -> Loss:
    """Minus the evidence lower bound, per row.

    Divergences known in closed form take the place of their sampled terms. Latents drawn without a path get
    the score-function gradient, each against the terms that its draw can influence, in its own plates;
    without `baselines` they get none.
    """
    share = Shares.of(problem, coupling.rows)
    program = coupling.program_terms(lanes, skip=coupling.analytic)
    guide = coupling.guide_terms([lane.guide for lane in lanes], skip=coupling.analytic)
    exact = coupling.divergences(lanes)

    likelihood = _total(share.mean(term) for name, term in program.items() if name not in coupling.order)
    kl: dict[str, Tensor] = {name: share.mean(term) for name, term in exact.items()}
    for name, term in guide.items():
        # A draw without a path moves the mean of its own log q by nothing: in the gradient it would be noise.
        own = share.mean(term.detach() if name in coupling.scored else term)
        kl[name] = own - share.mean(program[name]) if name in program else own
    divergence = _total(kl.values())
    metrics: dict[str, float | Tensor] = {
        "elbo": (likelihood - divergence).detach(),
        "kl": divergence.detach(),
    }

    gates = dict.fromkeys(kl, 1.0)
    if regularizer.floor > 0:
        groups = _groups(coupling, share, lanes, kl, regularizer)
        floors = {name: regularizer.floor * _unit(coupling, share, name) for name in kl}
        gates = {name: (kl[name] > floors[name]).detach() for name in kl}
        divergence = _total(bounds.free_bits(groups[name], floors[name]) for name in kl)
    loss = regularizer.beta * divergence - likelihood
    if coupling.scored and baselines is not None:
        weights = {name: regularizer.beta * gate for name, gate in gates.items()}
        surrogate = _scores(coupling, share, (program, guide, exact), lanes, weights, baselines)
        loss = loss + surrogate - surrogate.detach()  # its gradient only: the loss stays minus the bound
    return loss, metrics


def _scores(
    coupling: Coupling,
    share: Shares,
    terms: tuple[Mapping[str, Term], Mapping[str, Term], Mapping[str, Term]],
    lanes: Sequence[Lane],
    weights: Mapping[str, float | Tensor],
    baselines: Baselines,
) -> Tensor:
    """The score-function surrogate of every latent drawn without a path."""
    program, guide, exact = terms
    costs = {("p", n): t.detach() * (-share(t) * weights.get(n, 1.0)) for n, t in program.items()}
    costs |= {("q", n): t.detach() * (share(t) * weights[n]) for n, t in guide.items()}
    costs |= {("kl", n): t.detach() * (share(t) * weights[n]) for n, t in exact.items()}
    depends = {key: sites for key, sites in coupling.depends().items() if key in costs}
    log_guide = coupling.guide_terms(
        [lane.guide for lane in lanes], skip=set(coupling.order) - set(coupling.scored)
    )
    surrogate = []
    for site, log_q in log_guide.items():
        reach = estimators.downstream(site, coupling.graph, depends)
        cost = estimators.local_cost([costs[key] for key in costs if key in reach], log_q.dims)
        cost = cost.to(log_q.value.device).expand_as(log_q.value)
        if PARTICLES in log_q.dims:
            axis = log_q.dims.index(PARTICLES)
            baseline = estimators.leave_one_out(cost.movedim(axis, 0)).movedim(0, axis)
        else:
            baseline = baselines.before(site, cost)
        surrogate.append(estimators.score_function(log_q.value, cost, baseline) / _particles(log_q))
    return _total(surrogate)


def _unit(coupling: Coupling, share: Shares, name: str) -> float:
    """One nat of a site's own divergence, in the loss per row."""
    return share.shared if name in coupling.shared and coupling.rows is not None else 1.0


def _groups(
    coupling: Coupling,
    share: Shares,
    lanes: Sequence[Lane],
    kl: Mapping[str, Tensor],
    regularizer: Regularizer,
) -> dict[str, Tensor]:
    """The divergence of every site by group, `[groups]`, averaged over the batch."""
    if regularizer.per == "site":
        return {name: value.reshape(1) for name, value in kl.items()}
    return {name: _by_dimension(coupling, share, lanes, name) for name in kl}


def _by_dimension(coupling: Coupling, share: Shares, lanes: Sequence[Lane], name: str) -> Tensor:
    found = []
    for lane in lanes:
        q, p = lane.guide[name], lane.program[name]
        laws = [_elementwise(node.law) for node in (q, p)]
        if laws[0] is None or laws[1] is None:
            raise OptionError(
                f"free bits per dimension: site {name!r} has a {type(q.law).__name__} in the guide and a "
                f"{type(p.law).__name__} in the program, whose elements are not independent of each other; "
                "use free_bits_per='site'"
            )
        if name in coupling.analytic:
            kl = torch.distributions.kl_divergence(laws[0], laws[1])
        else:
            kl = laws[0].log_prob(q.value) - laws[1].log_prob(p.value)
        event = len(q.law.event_shape)
        per_batch = kl.reshape(*kl.shape[: kl.dim() - event], -1)
        per_batch = torch.stack([coupling.term(q, q.weigh(k)).sum_to(()).value for k in per_batch.unbind(-1)])
        first = coupling.term(q, q.log_prob().detach())
        found.append(per_batch * (share(first) / _particles(first)))
    return torch.stack(found).mean(0)


def _elementwise(law: torch.distributions.Distribution) -> torch.distributions.Distribution | None:
    """The law of the elements of a value, where they are independent of each other."""
    base = law.base_dist if isinstance(law, torch.distributions.Independent) else law
    return None if base.event_shape else base


# --- several samples at once ------------------------------------------------------------------------------


class Weights(NamedTuple):
    """`log p` and `log q` of every particle, `[K, rows]` or `[K]`, and what none of the draws touches.

    `dims` names the dimensions; `unit` is what a sum over the rows counts for in the loss per row.
    """

    log_program: Tensor
    log_guide: Tensor
    log_scored: Tensor | None
    rest: Tensor | float
    unit: float
    dims: tuple[str, ...]

    @property
    def log_weights(self) -> Tensor:
        """Log importance weights."""
        return self.log_program - self.log_guide


def weigh(
    coupling: Coupling,
    problem: Problem,
    program: Mapping[str, Term],
    guide: Mapping[str, Term],
    particles: int,
) -> Weights:
    """Collect terms into importance weights: one for each row, or for all rows if they share a latent.

    With latents that rows share, a weight is that of the whole data set, a batch standing for all N rows.
    """
    share = Shares.of(problem, coupling.rows)
    shared = any(coupling.rows not in term.dims for term in guide.values())
    rows = None if shared or _ties_rows(coupling, program) else coupling.rows
    inside = [t for t in program.values() if coupling.rows in t.dims]
    outside = [t for t in program.values() if coupling.rows not in t.dims]
    scored = [guide[n] for n in coupling.scored if n in guide]
    dims: tuple[str, ...] = (PARTICLES,) if rows is None else (PARTICLES, rows)
    size = (particles,) if rows is None else (particles, problem.rows or 1)

    def gather(terms: Iterable[Term]) -> Tensor:
        found = list(terms)
        if rows is None:
            scale = share.local / share.shared
            found = [t * scale if coupling.rows in t.dims else t for t in found]
        return estimators.local_cost(found, dims).expand(size)

    return Weights(
        log_program=gather(inside if rows is not None else [*inside, *outside]),
        log_guide=gather(guide.values()),
        log_scored=gather(scored) if scored else None,
        rest=0.0 if rows is None else _total(share.mean(t) for t in outside),
        unit=share.shared if rows is None else share.local,
        dims=dims,
    )


def _ties_rows(coupling: Coupling, program: Mapping[str, Term]) -> bool:
    """Whether a term that belongs to no single row depends on what the guide draws in each."""
    outside = [name for name, term in program.items() if coupling.rows not in term.dims]
    depends = coupling.depends() if outside else {}
    return any(depends.get(("p", name)) for name in outside)


def importance(
    coupling: Coupling, problem: Problem, lanes: Sequence[Lane], particles: int, alpha: float
) -> Loss:
    """Minus the Renyi bound of order alpha, per row; 0 is the importance-weighted bound."""
    guide = coupling.guide_terms([lane.guide for lane in lanes])
    weights = weigh(coupling, problem, coupling.program_terms(lanes), guide, particles)
    if weights.log_scored is not None:
        bound = estimators.vimco(weights.log_weights, weights.log_scored, alpha)
    else:
        bound = bounds.renyi(weights.log_weights, alpha)
    return per_row(weights, bound)


def wake(coupling: Coupling, problem: Problem, lanes: Sequence[Lane], particles: int) -> tuple[Loss, Loss]:
    """The wake halves of reweighted wake-sleep: losses of the program and of the guide."""
    guide = coupling.guide_terms([lane.guide for lane in lanes])
    weights = weigh(coupling, problem, coupling.program_terms(lanes), guide, particles)
    theta = bounds.wake_theta(weights.log_program, weights.log_guide)
    phi = bounds.wake_phi(weights.log_program, weights.log_guide)
    return per_row(weights, theta), per_row(weights._replace(rest=0.0), phi)


def sleep(coupling: Coupling, problem: Problem, guides: Sequence[Nodes]) -> Loss:
    """Minus `log q` at simulated values, per row."""
    share = Shares.of(problem, coupling.rows)
    loss = -_total(share.mean(term) for term in coupling.guide_terms(guides).values())
    return loss, {"log_guide": -loss.detach()}


def doubly(
    coupling: Coupling, problem: Problem, particles: int, frozen: Callable[[], AbstractContextManager]
) -> Loss:
    """Minus the importance-weighted bound, per row, with the doubly reparameterised gradient of the guide.

    `frozen` makes a context in which the learned tensors are fixed: `log q` is evaluated there, so that the
    guide's own tensors count only through the path of its draws.
    """
    shares: list[Term] = []  # known once the weights are; read on the way back

    def factor(node: Node, lane: int) -> Tensor:
        found = shares[0]
        one = particles == 1 or len(guides) > 1
        return coupling.lay(Term(found.value[lane], found.dims[1:]) if one else found, node)

    guides = coupling.draw(problem, particles)
    copies = [
        {
            name: bounds.scaled_path(node.value, partial(factor, node, lane))
            if name in coupling.order
            else node.value
            for name, node in nodes.items()
        }
        for lane, nodes in enumerate(guides)
    ]
    with frozen():
        scored = coupling.redraw(problem, copies, particles)
    lanes = coupling.follow(problem, scored, particles)
    weights = weigh(coupling, problem, coupling.program_terms(lanes), coupling.guide_terms(scored), particles)
    log_w = weights.log_weights
    share = log_w.softmax(0).detach()
    shares.append(Term(share, weights.dims))
    return per_row(weights, Bound(bounds.log_mean_exp(log_w).detach(), -(share * log_w).sum()))


def per_row(weights: Weights, bound: Bound) -> Loss:
    """A bound as a loss per row: minus the bound in value, the gradient that of the bound's loss."""
    value = bound.value.sum() * weights.unit + weights.rest
    value = value.detach()
    surrogate = bound.loss * weights.unit - weights.rest
    return surrogate - surrogate.detach() - value, {"bound": value}


def _particles(term: Term) -> int:
    return term.value.shape[term.dims.index(PARTICLES)] if PARTICLES in term.dims else 1


def _total(values: Iterable[Tensor]) -> Tensor:
    total: Tensor | None = None
    for value in values:
        total = value if total is None else total + value
    return torch.zeros(()) if total is None else total
