"""Consistency functions in place of denoisers: from any noisy value to the end of its path, so that few steps draw.

The network of a site keeps its form D(x, sigma); what is trained, and drawn by, is one Euler step with it from sigma to the
least level, f(x, sigma) = x + (1 - sigma_min / sigma) (D(x, sigma) - x): see `pgen.algorithms.diffusion.consistency`. D then
is no mean of anything, and leaves no score.

References:
    Song, Dhariwal, Chen & Sutskever, ICML 2023. Song & Dhariwal, ICLR 2024.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from pyro import poutine
from torch import Size, Tensor

from pgen.algorithms.diffusion import grids
from pgen.algorithms.diffusion.consistency import (
    Curriculum,
    consistency_distillation,
    consistency_training,
    end_of_path,
)
from pgen.algorithms.diffusion.field import Denoiser, Field
from pgen.algorithms.diffusion.noise import Streams
from pgen.algorithms.diffusion.schedules import Schedule
from pgen.algorithms.diffusion.solve import solve, start
from pgen.algorithms.diffusion.solvers import Consistency, Solver
from pgen.algorithms.diffusion.times import Importance
from pgen.backends.score.prior import denoising_law
from pgen.backends.score.training import conditioned, laid_out, remember
from pgen.capability import Capability, Refusal
from pgen.distributions.denoising import Denoising, Grid, in_parts, over_rows
from pgen.errors import OptionError
from pgen.fitted import Fitted
from pgen.problem import Problem
from pgen.run import Step
from pgen.structure import Structure

FIRST, LAST = 10, 160
"""Intervals of the grid of noise levels at the beginning and at the end of training."""

GRIDS: Mapping[str, Grid] = {
    "karras": lambda n, low, high: grids.karras(n, low, high, zero=False),
    "log-snr": lambda n, low, high: grids.log_snr(n, low, high, zero=False),
}
"""Noise levels from which to jump, and the least one, where jumps end."""


@dataclass(frozen=True)
class Jumping:
    """Draws: from noise to data in a few jumps.

    Attributes:
        steps: how many.
        grid: noise levels.
        solver: what takes the steps; None: `Consistency`.
    """

    steps: int = 2
    grid: Grid = GRIDS["karras"]
    solver: Solver | None = None

    def draw(self, law: Denoising, shape: Size, seed: int | None = None) -> Tensor:
        """Values `[*shape, *batch_shape, *event_shape]`; see `pgen.distributions.denoising.Reversed`."""
        return in_parts(law, shape, seed, self._rows)

    def _rows(self, law: Denoising, lead: Size, streams: Streams) -> Tensor:
        low, high = law.schedule.sigma_min, law.schedule.sigma_max
        grid = self.grid(self.steps, low, high)
        x = start(streams, law.event_shape, grid[0], law.like.new_empty(0), variance=1.0)
        end = end_of_path(over_rows(law, lead), low)
        return solve(x, grid, Field(end, streams), self.solver or Consistency(low))


@dataclass(frozen=True)
class Ends:
    """The loss of a law whose network is to say where paths end.

    Attributes:
        spread: from uniform numbers `[B]` to quantiles of noise levels, `[B]`.
        teacher: whose paths they are; None: those of the data.
        histograms: of losses by quantile, where levels are drawn where losses are large.
        dropout: share of the rows that lose their condition.
    """

    spread: Callable[[Tensor], Tensor]
    teacher: Teacher | None = None
    histograms: Mapping[str, Importance] | None = None
    dropout: float = 0.0
    metric: ClassVar[str] = "consistency"

    def at(self, batch: Problem, step: Step) -> Callable[[str, Any, Tensor], Tensor]:
        """The loss for a batch at a step: the grid gets finer; the teacher has laws of its own for the batch."""
        taught: Mapping[str, Any] = {} if self.teacher is None else self.teacher.laws(batch)
        number, steps = step.number, max(1, step.steps)

        def loss(name: str, law: Any, value: Tensor) -> Tensor:
            law, lead, x, lost = laid_out(law, value, self.dropout)
            low, high = law.schedule.sigma_min, law.schedule.sigma_max
            u = self.spread(torch.rand(len(x), dtype=x.dtype, device=x.device))
            ratio: Tensor | float = 1.0
            histogram = None if self.histograms is None else self.histograms[name]
            if histogram is not None:
                u, ratio = histogram.draw(u)
            lower, upper = Curriculum(steps, FIRST, LAST, low, high).levels(number, u)
            student, noise = end_of_path(over_rows(law, lead), low), torch.randn_like(x)
            if self.teacher is None:
                found = consistency_training(student, x, lower, upper, noise)
            else:
                of = self.teacher.denoiser(name, taught[name], law.schedule, lead, lost, self.dropout)
                found = consistency_distillation(student, of, x, lower, upper, noise)
            if histogram is not None:
                remember(histogram, u, found)
            return (found * ratio).reshape(lead)

        return loss


@dataclass(frozen=True, eq=False)
class Teacher:
    """A fit whose denoisers say where paths lead.

    Attributes:
        fitted: the fit.
        program: of it, what it learned built in.
    """

    fitted: Fitted
    program: Callable[..., Any]

    @staticmethod
    def of(fitted: Fitted) -> Teacher:
        """That of a fit."""
        return Teacher(fitted, fitted.program)

    def refusal(self, structure: Structure, matched: Sequence[str]) -> Refusal | None:
        """Why sites of a program cannot be taught by it, if so."""
        theirs = self.fitted.structure
        for name in matched:
            site, own = theirs.sites.get(name), structure.sites[name]
            if site is None:
                there = ", ".join(map(repr, theirs.sites)) or "none"
                return Refusal(
                    name, "a teacher", f"the teacher, {theirs.name}, has no site {name!r}; it has {there}"
                )
            if Capability.DENOISER not in site.capabilities:
                why = f"the site {name!r} of the teacher, {theirs.name}, is {site.distribution}, which has no denoiser"
                return Refusal(name, "a teacher with a denoiser", why)
            if tuple(site.event_shape) != tuple(own.event_shape):
                why = (
                    f"the teacher's values at {name!r} have shape {tuple(site.event_shape)}, the student's "
                    f"{tuple(own.event_shape)}"
                )
                return Refusal(name, "a teacher of the same values", why)
            whole = [getattr(s.support, "is_discrete", False) for s in (site, own)]
            if whole[0] != whole[1]:
                kinds = ["whole numbers" if w else "real numbers" for w in whole]
                why = f"the teacher's values at {name!r} are {kinds[0]}, the student's {kinds[1]}"
                return Refusal(name, "a teacher of the same values", why)
        return None

    def begin(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the teacher's learned tensors for a start, where names and shapes are the same."""
        with torch.no_grad():
            for name, tensor in self.fitted.parameters.items():
                if name in tensors and tensors[name].shape == tensor.shape:
                    tensors[name].copy_(tensor)

    @torch.no_grad()
    def laws(self, batch: Problem) -> dict[str, Any]:
        """Its laws, for the rows of a batch, where they can denoise."""
        like = next(iter(self.fitted.parameters.values()), None)
        own = replace(batch, program=self.program)
        trace: Any = poutine.trace(own if like is None else own.to(like.device, like.dtype)).get_trace()
        sites = self.fitted.structure.sites
        able = [s for s in trace.nodes if s in sites and Capability.DENOISER in sites[s].capabilities]
        return {s: denoising_law(trace.nodes[s]["fn"]) for s in able}

    def denoiser(
        self, name: str, law: Any, schedule: Schedule, lead: Size, lost: Tensor | None, dropout: float
    ) -> Denoiser:
        """Its denoiser over flat rows, as it is drawn by: with its guidance, and without the conditions that are lost.

        Raises:
            OptionError: the schedule goes beyond the teacher's.
        """
        low, high = law.schedule.sigma_min, law.schedule.sigma_max
        if schedule.sigma_min < low * (1 - 1e-6) or schedule.sigma_max > high * (1 + 1e-6):
            raise OptionError(
                f"Score(teacher=...): at {name!r} the teacher knows noise levels from {low:g} to {high:g}, and the student's "
                f"{schedule!r} goes from {schedule.sigma_min:g} to {schedule.sigma_max:g}; expected a schedule within the teacher's"
            )
        guidance = getattr(self.fitted.backend, "guidance", 1.0)
        if getattr(law, "context", None) is not None:
            law = conditioned(law, lead, None if lost is None else lost.to(law.context.device), dropout)
            law = law.guided(guidance) if guidance != 1.0 else law
        over, like = over_rows(law, lead), law.like

        def denoiser(rows: Tensor, sigma: Tensor) -> Tensor:
            return over(rows.to(like), sigma.to(like)).to(rows)

        return denoiser


def refused(
    structure: Structure, inferred: Sequence[str], matched: Sequence[str], teacher: Fitted | None
) -> Refusal | None:
    """Why a program cannot be served by consistency functions, if so.

    Args:
        structure: of the program.
        inferred: latents that data bear upon.
        matched: observed sites that are trained.
        teacher: whose paths are to be followed.
    """
    if inferred:
        why = (
            f"data bear upon the latent {inferred[0]!r}, and loss='consistency' takes the networks of the program for "
            "consistency functions, which draw and have no score to infer by; loss='denoising' infers"
        )
        return Refusal(inferred[0], "a score", why)
    return None if teacher is None else Teacher.of(teacher).refusal(structure, matched)


def require_consistent(options: Any) -> None:
    """Check options that go with `loss="consistency"` alone, or not with it.

    Raises:
        OptionError: they are together.
    """
    jumps, teacher = options.loss == "consistency", options.teacher
    if teacher is not None:
        if not isinstance(teacher, Fitted):
            raise OptionError(f"Score(teacher={teacher!r}): expected what pgen.fit returned, or None")
        if not jumps:
            raise OptionError(
                f"Score(loss={options.loss!r}, teacher=...): a teacher is followed by loss='consistency' alone; expected "
                "Score(loss='consistency', teacher=fitted)"
            )
        if getattr(teacher.backend, "loss", None) == "consistency":
            raise OptionError(
                "Score(teacher=...): the teacher was fitted with loss='consistency' itself, so that it has no denoisers to "
                "follow; expected a fit such as pgen.fit(program, data, 'score')"
            )
    if not jumps:
        return
    if isinstance(options.solver, str) and options.solver not in ("auto", "consistency"):
        raise OptionError(
            f"Score(solver={options.solver!r}, loss='consistency'): expected 'auto', or an object with `step` that is given a "
            "consistency function"
        )
    for option, usual, why in (
        ("weighting", "auto", "which has weights of its own"),
        ("coupling", "independent", "which follows paths of noise that is not paired"),
        (
            "guidance",
            1.0,
            "whose draws are not guided: guide the teacher, pgen.backend('score', guidance=...)",
        ),
    ):
        if getattr(options, option) != usual:
            raise OptionError(
                f"Score({option}={getattr(options, option)!r}): expected {usual!r} with loss='consistency', {why}"
            )
