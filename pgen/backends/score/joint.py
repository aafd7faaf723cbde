r"""Latents with denoisers learned together with the rest of a program: a guide draws them, and denoisers learn from the draws.

    guide q(z | x), likelihood p(x | z), denoiser D of z    maximise E_q[ log p(x | z) + B(z) - log q(z | x) ]

B is the variational bound on the log density of the diffusion, -|z - D(z + sigma eps, sigma)|^2 / (2 sigma^2) over all log
noise levels and what is constant, so that the evidence is bounded from below. Where another weighting w is asked for,

    the denoiser D of z    minimises E_q[ w(sigma) |z - D(z + sigma eps, sigma)|^2 ]

with draws held fixed; the gradient of B then passes through the denoiser to the draws, not into the denoiser's own tensors.

References:
    Vahdat, Kreis & Kautz, Score-based Generative Modeling in Latent Space, NeurIPS 2021.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pgen.algorithms.progress import followed
from pgen.backends.score.prior import counted, denoising_law
from pgen.backends.score.rows import Row, by_row
from pgen.backends.score.training import Objective
from pgen.capability import Capability, Exactness
from pgen.distributions.denoising import Bounded
from pgen.guides.proposal import Proposal
from pgen.guides.statements import Nodes, record
from pgen.parameters import Parameters
from pgen.problem import Problem
from pgen.run import Step
from pgen.structure import Structure

_REPEATS = 8  # of a bound, for its error
_ROWS = 1 << 14  # rows of the data times draws that are run together


class Sites(NamedTuple):
    """The sites of a program by what they add to a bound.

    Attributes:
        drawn: latents that the guide draws.
        denoised: of those and of what depends on them, the sites with a denoiser.
        weighed: the other ones, with a log probability.
    """

    drawn: tuple[str, ...]
    denoised: tuple[str, ...]
    weighed: tuple[str, ...]

    @staticmethod
    def of(structure: Structure) -> Sites:
        """Those of a structure: all that an evidenced latent has a part in."""
        drawn = tuple(s for s in structure.latents if s in structure.evidenced)
        below = [
            s
            for s in (*structure.observed, *structure.factors)
            if any(p in drawn for p in structure.sites[s].parents)
        ]
        able = {s.name for s in structure if Capability.DENOISER in s.capabilities}
        return Sites(
            drawn,
            tuple(s for s in (*drawn, *below) if s in able),
            tuple(s for s in (*drawn, *below) if s not in able),
        )


def loss_of(
    objective: Objective | None,
    proposal: Proposal,
    parameters: Parameters,
    structure: Structure,
    apart: Callable[[Problem, Step], tuple[Tensor, Mapping[str, float | Tensor]]] | None,
    rows: int,
) -> Callable[[Problem, Step], tuple[Tensor, dict[str, float | Tensor]]]:
    """The loss of a program and a guide, per row.

    Args:
        objective: of sites with a denoiser, their values held fixed; None: the bound itself.
        proposal: the guide.
        parameters: the learned tensors of both.
        structure: of the program.
        apart: the loss of the sites that no drawn latent bears upon; None where there are none.
        rows: of the whole data.
    """
    sites = Sites.of(structure)

    def loss(batch: Problem, step: Step) -> tuple[Tensor, dict[str, float | Tensor]]:
        frozen = parameters.frozen()

        def fixed(law: Any) -> Any:
            apart = objective is not None and hasattr(law, "within")
            return law.within(lambda: frozen.installed(step.training)) if apart else law

        def share(name: str, total: Tensor) -> Tensor:
            return total.sum() / ((batch.rows or 1) if structure.local(name) else rows)

        guide, program = run(proposal, batch)
        bound = torch.zeros((), device=batch.device)
        for name, log in terms(sites, guide, program, Bounded(), fixed).items():
            bound = bound + share(name.rpartition(" ")[2], log)
        metrics: dict[str, float | Tensor] = {"bound": bound.detach()}
        total = -bound
        for name in sites.denoised:
            node = program[name]
            law = denoising_law(node.law)
            if objective is None or not hasattr(law, "within"):  # the bound itself teaches the denoiser
                continue
            context = getattr(law, "context", None)
            held = law if context is None else law.conditioned(context.detach())
            each = node.weigh(counted(node.law, objective(name, held, node.value.detach())))
            metrics[f"{name}.denoising"] = each.detach().mean()
            total = total + share(name, each)
        if apart is not None:
            more, others = apart(batch, step)
            total, metrics = total + more, {**metrics, **others}
        return total, metrics

    return loss


def run(proposal: Proposal, problem: Problem) -> tuple[Nodes, Nodes]:
    """The statements of the guide, and those of the program at the values that it drew."""
    guide = record(proposal.guide(problem))
    return guide, record(problem, {name: node.value for name, node in guide.items()})


def terms(
    sites: Sites,
    guide: Nodes,
    program: Nodes,
    bounded: Bounded,
    fixed: Callable[[Any], Any] = lambda law: law,
) -> dict[str, Tensor]:
    """What each statement adds to the bound, in nats, over its batch: `"log p of x"`, `"log q of z"` and so on."""
    found = {f"log q of {s}": -guide[s].log_prob() for s in guide if not guide[s].subsample}
    found |= {f"log p of {s}": program[s].log_prob() for s in sites.weighed}
    for s in sites.denoised:
        node = program[s]
        found[f"log p of {s}"] = node.weigh(
            counted(node.law, bounded.bound(fixed(denoising_law(node.law)), node.value))
        )
    return found


@dataclass(frozen=True, eq=False)
class Guided:
    """Queries that a learned guide answers; its tensors and those of the program are installed.

    Attributes:
        proposal: the guide.
        drawn: what it draws: the queries are about these latents.
        particles: draws for each row, for a bound.
    """

    proposal: Proposal
    drawn: tuple[str, ...]
    particles: int = 64

    def serves(self, structure: Structure) -> bool:
        """Whether what is unobserved, and told of by the data, is what the guide draws."""
        return set(self.drawn) == set(structure.evidenced)

    def draws(self, problem: Problem, structure: Structure, n: int) -> dict[str, Tensor]:
        """Draws of the latents, `[n, *shape]`."""
        parts = [
            {s: self._apart(part[s].value, structure, s, count) for s in self.drawn}
            for count, _, part, _ in self._runs(problem, structure, n, program=False)
        ]
        return {s: torch.cat([part[s] for part in parts]) for s in self.drawn}

    def bound(self, problem: Problem, structure: Structure) -> Row:
        """Lower bound on the log evidence of what the latents bear upon.

        The noise levels of a row's draws cover the schedule evenly, so that the error is that of independent repetitions.
        """
        n = max(1, self.particles // _REPEATS)
        each = torch.stack([self._once(problem, structure, n) for _ in range(_REPEATS)])
        stderr = each.std(0) / math.sqrt(_REPEATS)
        return Row(each.mean(0), stderr, None, n * _REPEATS, Exactness.LOWER_BOUND)

    def _once(self, problem: Problem, structure: Structure, n: int) -> Tensor:
        """The bound from so many draws, `[rows]`."""
        sites = Sites.of(structure)
        parts: list[Tensor] = []
        for count, some, guide, program in self._runs(problem, structure, n, program=True):
            rows = 1 if structure.tied else (some.rows or 1) // count
            total = torch.zeros(count * rows, device=problem.device)
            for name, log in terms(sites, guide, program, Bounded()).items():
                total = total + by_row(structure, name.rpartition(" ")[2], log)
            parts.append(total.reshape(count, rows))
        return torch.cat(parts).mean(0)

    def _runs(
        self, problem: Problem, structure: Structure, n: int, *, program: bool
    ) -> Iterator[tuple[int, Problem, Nodes, Nodes]]:
        """Draws, as many as go together: how many, of which rows, and the statements of guide and program.

        Rows that are independent stand side by side, each as often as there are draws; where they share a latent, or the
        guide has a law of its own for each of them, there is one draw at a time.
        """
        rows = problem.rows
        if rows is None or structure.tied or self.proposal.fixed:
            for _ in followed(range(n), "weighing draws"):
                yield (1, problem, *self._run(problem, program))
            return
        each = max(1, _ROWS // rows)
        for start in followed(range(0, n, each), "weighing draws"):
            count = min(each, n - start)
            some = problem.take(torch.arange(rows).repeat(count))
            yield (count, some, *self._run(some, program))

    def _run(self, problem: Problem, program: bool) -> tuple[Nodes, Nodes]:
        return run(self.proposal, problem) if program else (record(self.proposal.guide(problem)), {})

    def _apart(self, value: Tensor, structure: Structure, name: str, count: int) -> Tensor:
        """Values of repeated rows as draws, `[count, *shape]`."""
        site = structure.sites[name]
        plate = next((structure.plates[p] for p in site.plates if p in structure.data_plates), None)
        if count == 1 or plate is None:
            return value.unsqueeze(0)
        axis = value.dim() - len(site.event_shape) + plate.dim
        return value.unflatten(axis, (count, -1)).movedim(axis, 0)
