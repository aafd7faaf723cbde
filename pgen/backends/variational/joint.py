"""Guide and program run side by side on the same values, and what each site adds to the log weight.

    guide -> values of its latents -> program on those values -> one `Term` per site, its dimensions named

Particles run under one outermost plate where that gives what separate runs give (`agrees`), and one after
the other elsewhere. Latents that the guide leaves to the program are summed out exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import networkx as nx
import pyro
import torch
from torch import Tensor

from pgen.algorithms.estimators import Term
from pgen.algorithms.sum_product import log_partition
from pgen.calling import signature_of
from pgen.enumeration import Enumeration, enumerate_sites
from pgen.guides.proposal import Guide
from pgen.guides.statements import Node, Nodes, Record, record
from pgen.handlers import ScaleRows, Substitute
from pgen.isolation import validating
from pgen.problem import Problem
from pgen.structure import Structure

PARTICLES = "_particles"
SUMMED = "summed out"  # the name of the term of all factors that hold a latent which is summed out


class Lane(NamedTuple):
    """Statements of guide and program on the same values, for all particles at once or for one of them.

    `sums` holds the factors of the program by site where latents were summed out, to be used in place of the
    program's own log probabilities, and `factors` all that those sums were made of.
    """

    guide: Nodes
    program: Nodes
    sums: Mapping[str, Term] | None = None
    factors: Enumeration | None = None


@dataclass(frozen=True, eq=False)
class Coupling:
    """What is known of a guide and a program before the first step, and how the two are run.

    Attributes:
        structure: of the program.
        guide: the guide.
        order: latents in the order in which the guide draws them, auxiliary ones among them.
        graph: dependence among the guide's sites.
        row_plates: names of the plates over the rows, of program and guide.
        summed: latents of the program that are summed out.
        barren: latents that bear on nothing observed: the program draws them, and they count for nothing.
        given: latents of the guide that are observed now.
        scored: latents of the guide that are drawn without a path.
        analytic: latents whose divergence is known in closed form.
        nesting: batch dimensions that guide and program use.
        vectorized: particles run under one plate.
        check: sums over many values at once are compared with those over single ones.
        apart: the program takes the values of what is summed out one by one only.
    """

    structure: Structure
    guide: Guide
    order: tuple[str, ...] = ()
    graph: nx.DiGraph = field(default_factory=nx.DiGraph)
    row_plates: frozenset[str] = frozenset()
    summed: tuple[str, ...] = ()
    barren: tuple[str, ...] = ()
    given: tuple[str, ...] = ()
    scored: tuple[str, ...] = ()
    analytic: frozenset[str] = frozenset()
    nesting: int = 0
    vectorized: bool = True
    check: bool = False
    apart: bool = False

    @property
    def rows(self) -> str | None:
        """The name under which the rows appear in terms."""
        return self.structure.data_plate

    @property
    def shared(self) -> tuple[str, ...]:
        """Latents of the guide that all rows share."""
        sites = self.structure.sites
        return tuple(s for s in self.order if s not in sites or not self.structure.local(s))

    # --- running --------------------------------------------------------------------------------------------

    def draw(self, problem: Problem, particles: int, *, detach: bool = False) -> list[Nodes]:
        """The guide's statements, in one lane for all particles or one lane each."""
        run = self.guide(problem)
        given = {**problem.inputs, **problem.observations} if self.given else {}
        values = {name: given[name] for name in self.given}
        if particles == 1 or self.vectorized:
            return [record(self.side_by_side(run, particles), values, detach)]
        return [record(run, values, detach) for _ in range(particles)]

    def redraw(self, problem: Problem, lanes: Sequence[Mapping[str, Tensor]], particles: int) -> list[Nodes]:
        """The guide's statements at given values."""
        found = []
        for values in lanes:
            run = self.guide(
                _same_rows(problem, {n: v for n, v in values.items() if n in self.structure.plates})
            )
            found.append(record(self.side_by_side(run, particles if len(lanes) == 1 else 1), values))
        return found

    def follow(self, problem: Problem, guides: Sequence[Nodes], particles: int) -> list[Lane]:
        """The program's statements at the values of the guide's."""
        count = particles if len(guides) == 1 else 1
        run = self.side_by_side(problem, count)
        lanes = []
        for nodes in guides:
            values = {name: node.value for name, node in nodes.items()}
            if self.summed:
                lanes.append(self._summed_lane(run, nodes, values, count, problem.scale))
            else:
                lanes.append(Lane(nodes, record(run, values)))
        return lanes

    def weigh(self, problem: Problem, particles: int, *, detach: bool = False) -> list[Lane]:
        """Draw from the guide and follow with the program."""
        return self.follow(problem, self.draw(problem, particles, detach=detach), particles)

    def side_by_side(self, run: Callable[[], object], particles: int) -> Callable[[], object]:
        """A run under the plate of particles, left of all batch dimensions in use."""
        if particles == 1:
            return run

        def vectorized() -> None:
            with pyro.plate(PARTICLES, particles, dim=-1 - self.nesting):
                run()

        return vectorized

    def _summed_lane(
        self,
        run: Callable[[], object],
        guide: Nodes,
        values: Mapping[str, Tensor],
        particles: int,
        scale: float,
    ) -> Lane:
        """The program's statements with all values of the latents that are summed out, and the sums.

        A latent that all rows share is summed outside of their product: there, a batch has to stand for all
        rows (`scale` for each) before the sum.
        """
        outside = self.rows is not None and not all(map(self.structure.local, self.summed))
        scale = scale if outside else 1.0
        kept: list[Nodes] = []

        def once() -> None:
            with ScaleRows(self.structure.data_plates, scale), Record(values) as nodes:
                run()
            kept.append(nodes.nodes)

        powers = dict.fromkeys(self.structure.data_plates, scale)
        nesting = self.nesting + (particles > 1)
        found = enumerate_sites(
            once,
            self.structure,
            self.summed,
            nesting=nesting,
            powers=powers,
            check=self.check,
            apart=self.apart,
        )
        alive = {name: factor for name, factor in found.factors.items() if name not in self.barren}
        together = [
            name for name, factor in alive.items() if not found.variables.keys().isdisjoint(factor.names)
        ]
        terms = {}
        for name, factor in alive.items():
            if name not in together:
                power = math.prod(found.powers.get(plate, 1.0) for plate in factor.names)
                log = factor.log * (power / scale if self.structure.local(name) else power)
                terms[name] = Term(log, tuple(map(self._named, factor.names)))
        keep = (PARTICLES,) if particles > 1 else ()
        keep = keep if outside or self.rows is None else (*keep, self.rows)
        keep = tuple(plate for plate in keep if any(plate in alive[name].names for name in together))
        terms[SUMMED] = Term(log_partition(found.graph(together, keep)), keep)
        return Lane(guide, kept[-1], terms, found)

    # --- terms ----------------------------------------------------------------------------------------------

    def program_terms(self, lanes: Sequence[Lane], skip: Collection[str] = ()) -> dict[str, Term]:
        """`log p` of every site of the program (the summed ones together), except those to skip."""
        if lanes[0].sums is not None:
            names = [n for n in lanes[0].sums if n not in skip]
            return {n: _stack([lane.sums[n] for lane in lanes if lane.sums is not None]) for n in names}
        away = {*skip, *self.barren}
        names = [n for n, node in lanes[0].program.items() if not node.subsample and n not in away]
        return {n: _stack([self.term(lane.program[n]) for lane in lanes]) for n in names}

    def guide_terms(self, lanes: Sequence[Nodes], skip: Collection[str] = ()) -> dict[str, Term]:
        """`log q` of every site of the guide, except those to skip."""
        names = [n for n in lanes[0] if n in self.order and n not in skip]
        return {n: _stack([self.term(lane[n]) for lane in lanes]) for n in names}

    def divergences(self, lanes: Sequence[Lane]) -> dict[str, Term]:
        """`KL(q || p)` of every site where it is known in closed form, given the values of its parents."""
        return {
            n: _stack([self._divergence(lane, n) for lane in lanes]) for n in self.order if n in self.analytic
        }

    def _divergence(self, lane: Lane, name: str) -> Term:
        q, p = lane.guide[name], lane.program[name]
        return self.term(q, q.weigh(torch.distributions.kl_divergence(q.law, p.law)))

    def term(self, node: Node, log: Tensor | None = None) -> Term:
        """A tensor over a statement's batch (its log probability) with the batch dimensions named."""
        log = node.log_prob() if log is None else log
        names = {f.dim: self._named(f.name) for f in node.frames}
        sizes = {f.dim: f.size for f in node.frames}
        return name_dims(log, names, sizes)

    def lay(self, weights: Term, node: Node) -> Tensor:
        """Weights over named dimensions, laid out to broadcast against a statement's value."""
        event = len(node.law.event_shape)
        names = {f.dim: self._named(f.name) for f in node.frames}
        dims = [names.get(d, f"({d})") for d in range(event - node.value.dim(), 0)]
        aligned = weights.align([*(n for n in weights.dims if n not in dims), *dims])
        return aligned.reshape(aligned.shape + (1,) * event)

    def _named(self, plate: str) -> str:
        return self.rows if plate in self.row_plates and self.rows is not None else plate

    def depends(self) -> dict[tuple[str, str], set[str]]:
        """The guide's sites whose draws each term was computed from, by ("p" | "q" | "kl", site)."""
        found: dict[tuple[str, str], set[str]] = {}
        own = set(self.order)
        for s in self.structure:
            key = ("p", SUMMED if self._holds_summed(s.name) else s.name)
            found[key] = found.get(key, set()) | (self._given(s.name) & own) | ({s.name} & own)
        for n in self.order:
            found["q", n] = {n, *self.graph.predecessors(n)}
            if n in self.analytic:
                found["kl", n] = set(self.graph.predecessors(n)) | (self._given(n) & own)
        return found

    def _holds_summed(self, name: str) -> bool:
        return bool(self.summed) and not {name, *self.structure.sites[name].parents}.isdisjoint(self.summed)

    def _given(self, name: str) -> set[str]:
        """Parents of a program's site, with every earlier latent where they are not known for sure."""
        site = self.structure.sites[name]
        return set(site.parents) if site.certain else set(self.order)


def _same_rows(problem: Problem, chosen: Mapping[str, Tensor]) -> Problem:
    """The problem, its program choosing the given subsamples: an automatic guide looks at those rows."""
    program = problem.program
    if not chosen:
        return problem

    def again(*args: Any, **kwargs: Any) -> object:
        with Substitute(chosen):
            return program(*args, **kwargs)

    signature = signature_of(program)
    if signature is not None:
        again.__signature__ = signature  # type: ignore[attr-defined]
    return replace(problem, program=again)


def name_dims(log: Tensor, names: Mapping[int, str], sizes: Mapping[int, int]) -> Term:
    """A term from a tensor and the names of its dimensions from the right; unnamed ones are summed out."""
    depth = log.dim()
    if depth == len(names) and all(sizes[d] == log.shape[d] for d in names if d >= -depth):
        return Term(log, tuple(names[d] for d in sorted(names)))
    shape = [sizes.get(d, log.shape[d] if d >= -depth else 1) for d in range(min([-depth, *names]), 0)]
    log = log.expand(shape)
    rest = [d for d in range(-len(shape), 0) if d not in names]
    return Term(log.sum(rest) if rest else log, tuple(names[d] for d in sorted(names)))


def _stack(terms: Sequence[Term]) -> Term:
    """One term for all lanes: a lane each becomes a particle each."""
    if len(terms) == 1:
        return terms[0]
    return Term(torch.stack([t.value for t in terms]), (PARTICLES, *terms[0].dims))


def agrees(coupling: Coupling, problem: Problem) -> bool:
    """Whether two particles under one plate get the log probabilities that two separate runs get.

    A program that sums, indexes or multiplies without regard to leading dimensions goes silently wrong under
    an outer plate, and so does a guide.
    """
    try:
        with torch.random.fork_rng(), torch.no_grad(), validating(False):
            torch.manual_seed(1)
            single = record(coupling.guide(problem))
            both = coupling.weigh(problem, 2)
            together = _sitewise(coupling, both)
            for k in range(2):
                values = {
                    n: _particle(node, single[n], k) for n, node in both[0].guide.items() if n in single
                }
                alone = coupling.follow(problem, coupling.redraw(problem, [values], 1), 1)
                for name, term in _sitewise(coupling, alone).items():
                    mine = together[name]
                    mine = (
                        mine.value.select(mine.dims.index(PARTICLES), k)
                        if PARTICLES in mine.dims
                        else mine.value
                    )
                    if not torch.allclose(mine, term.value, rtol=1e-4, atol=1e-5, equal_nan=True):
                        return False
    except Exception:  # whatever it raises, it does not run side by side
        return False
    return True


def _sitewise(coupling: Coupling, lanes: Sequence[Lane]) -> dict[tuple[str, str], Term]:
    guide = coupling.guide_terms([lane.guide for lane in lanes])
    return {("q", n): t for n, t in guide.items()} | {
        ("p", n): t for n, t in coupling.program_terms(lanes).items()
    }


def _particle(node: Node, single: Node, k: int) -> Tensor:
    """The value of one particle, shaped as a run of its own shapes it."""
    vectorized = any(f.name == PARTICLES for f in node.frames) and node.value.numel() > single.value.numel()
    return node.value[k].reshape(single.value.shape) if vectorized else node.value.reshape(single.value.shape)
