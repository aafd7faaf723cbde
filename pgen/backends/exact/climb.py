"""Climbing to a maximum: by L-BFGS on all rows at once where a problem is small, otherwise as the run says."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, MutableMapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from pgen.history import History, Stopped
from pgen.observers import Audience
from pgen.problem import Problem
from pgen.run import Player, Run, Step
from pgen.sampling import observed_scalars
from pgen.structure import Structure
from pgen.threads import threads_restored
from pgen.training.batches import forked
from pgen.training.optimizers import uncompiled
from pgen.training.players import evaluate, require_trainable

_ITERATIONS = 500
_UNRECORDED = 60  # evaluations after which a recording is likely to pay
_LEARNED = 5_000  # scalars at most that L-BFGS moves
_OBSERVED = 20_000  # scalars at most that each of its evaluations looks at
_FLAT = {torch.float64: 1e-9, torch.float32: 1e-6}  # a gradient, per row, at which there is nothing to gain
_STEEP = 1e-3  # one at which there still is, relative to the loss
_LEAST_STEPS = 100  # of a run, to tell whether its loss was falling
_OURS = ("steps", "batch_size", "optimizer", "lr", "schedule", "warmup_steps", "weight_decay", "ema")
_OURS += ("validation", "checkpoint_every")
_NUMERICAL = (ArithmeticError, ValueError, torch.linalg.LinAlgError)


def maximise(
    player: Player, problem: Problem, structure: Structure, run: Run, buffers: MutableMapping[str, Tensor]
) -> History:
    """Let a player optimise: to the maximum if the run leaves it open how and the problem is small.

    Args:
        player: whose loss it is.
        problem: the rows that batches are taken from.
        structure: of the problem.
        run: how to go about it. Where it says nothing of steps, batches, optimiser or validation, a small
            problem is solved by L-BFGS on all rows.
        buffers: tensors that the loss changes in place; a program that does so is trained as the run says.
    """
    small = player.parameters and _left_open(run) and _small(player, problem, structure)
    found = _climbed(player, problem, run, buffers) if small else None
    return _judged(run.optimize({"program": player}, problem, buffers=buffers)) if found is None else found


def _left_open(run: Run) -> bool:
    default = Run()
    return run.precision != "bfloat16" and all(getattr(run, o) == getattr(default, o) for o in _OURS)


def _small(player: Player, problem: Problem, structure: Structure) -> bool:
    learned = sum(tensor.numel() for tensor in player.parameters.values())
    observed = observed_scalars(problem, structure, together=True)
    streamed = problem.source is not None or problem.suggested_batch is not None
    return not streamed and learned <= _LEARNED and observed <= _OBSERVED


def _climbed(
    player: Player, problem: Problem, run: Run, buffers: MutableMapping[str, Tensor]
) -> History | None:
    """Go to the maximum by L-BFGS; None, with all as it was, where the loss is no function of the point."""
    require_trainable({"program": player})
    began, stopped = time.perf_counter(), "finished"
    tensors, audience = list(player.parameters.values()), Audience(run.watchers())
    kept = {name: buffer.clone() for name, buffer in buffers.items()}
    replays = run.replays("program", player, tensors, buffers, fixed=True, wait=_UNRECORDED)
    with forked([tensors[0].device]) as generators, torch.enable_grad(), threads_restored():

        def seeded(seed: int = run.seed) -> None:
            for generator in generators:
                generator.manual_seed(seed)

        def evaluated() -> tuple[Tensor, Sequence[Tensor | None]]:
            seeded()
            step = Step(1, _ITERATIONS)
            if replays is None:
                found = evaluate("program", player, problem, step, nullcontext())
            else:
                found = replays(problem, step, nullcontext)
            return found.loss, found.gradients

        with player.within(Step(0, _ITERATIONS)):
            seeded()
            first = player.loss(problem, Step(0, _ITERATIONS))[0]
            seeded(run.seed + 1)
            again = player.loss(problem, Step(1, _ITERATIONS))[0]
            idle = [k for k, v in player.parameters.items() if first.requires_grad and _is_idle(first, v)]
        unmoved = all(torch.equal(kept[name], buffer) for name, buffer in buffers.items())
        if not (unmoved and first.requires_grad and torch.allclose(first, again, rtol=1e-4, atol=1e-5)):
            with torch.no_grad():
                for name, value in kept.items():
                    buffers[name].copy_(value)
            return None
        audience.start(run, _ITERATIONS)
        climb = Climb(evaluated, tensors, audience)
        try:
            climb.go()
        except KeyboardInterrupt:
            stopped = "interrupted"
    warnings = []
    told = None if replays is None else replays.warning()
    if told is not None:
        warnings.append(told)
    if idle:
        names = ", ".join(map(repr, idle))
        warnings.append(f"player 'program': no loss depends on {names}, which keep their values")
    if climb.steepest > _STEEP * (1 + abs(climb.lowest)):
        warnings.append(
            f"after {len(climb.losses)} iterations of L-BFGS the gradient is still {climb.steepest:.2g} per row, "
            "so that this may be no maximum; the likelihood may have none (a scale that goes to zero)"
        )
    history = History(
        metrics={"loss": _series(climb.losses), "grad_norm": _series(climb.norms)},
        steps=len(climb.losses),
        seconds=time.perf_counter() - began,
        stopped=cast("Stopped", stopped),
        seed=run.seed,
        warnings=tuple(warnings),
    )
    audience.finish(history)
    return history


def differentiated(
    loss: Callable[[], Tensor], tensors: Sequence[Tensor]
) -> Callable[[], tuple[Tensor, Sequence[Tensor | None]]]:
    """A loss with its gradient."""

    def evaluate() -> tuple[Tensor, Sequence[Tensor | None]]:
        value = loss()
        return value.detach(), torch.autograd.grad(value, list(tensors), allow_unused=True)

    return evaluate


class Climb:
    """A descent by L-BFGS that passes over numbers that are not finite, and ends at the best point it saw.

    Attributes:
        losses: before each iteration, and `norms` of the gradient.
        steepest: the largest element of the gradient at the best point.
    """

    def __init__(
        self,
        evaluate: Callable[[], tuple[Tensor, Sequence[Tensor | None]]],
        tensors: Sequence[Tensor],
        audience: Audience | None = None,
    ) -> None:
        """Take a loss with its gradient, always the same at the same values of the tensors, which are changed in place."""
        self.evaluate, self.tensors, self.audience = evaluate, list(tensors), audience
        self.losses: list[float] = []
        self.norms: list[float] = []
        self._last = self._best = self._evaluated()

    @property
    def steepest(self) -> float:
        """The largest element of the gradient at the best point."""
        return float(self._best[2].abs().max())

    @property
    def lowest(self) -> float:
        """The loss at the best point."""
        return self._best[1]

    def go(self, iterations: int = _ITERATIONS) -> None:
        """Go down until the gradient vanishes, or no step helps: then once more without a memory of the way."""
        flat = max(_FLAT.get(tensor.dtype, 1e-6) for tensor in self.tensors)
        optimizer, idle = self._optimizer(), 0
        try:
            while len(self.losses) < iterations and self.steepest > flat and idle < 2:
                before = self._best[1]
                self.losses.append(before)
                self.norms.append(float(self._best[2].norm()))
                if self.audience is not None:
                    self.audience.step(len(self.losses) - 1, {"loss": before, "grad_norm": self.norms[-1]})
                optimizer.step(self._closure)
                gained = before - self._best[1] > 0
                idle = 0 if gained else idle + 1
                if not gained:
                    self._put(self._best[0])
                    optimizer = self._optimizer()
        finally:
            self._put(self._best[0])

    def _optimizer(self) -> torch.optim.LBFGS:
        with uncompiled():
            return torch.optim.LBFGS(
                self.tensors,
                max_iter=1,
                line_search_fn="strong_wolfe",
                tolerance_grad=0.0,
                tolerance_change=1e-12,
            )

    def _closure(self) -> Tensor:
        """The loss and its gradient where the tensors are; beyond all that is finite, a wall."""
        point = self._point()
        if not torch.equal(point, self._last[0]):
            try:
                self._last = self._evaluated()
            except _NUMERICAL:
                self._last = point, math.nan, torch.zeros_like(point)
        _, loss, gradient = self._last
        if not (math.isfinite(loss) and bool(gradient.isfinite().all())):
            wall = self._best[1] + 1e3 * (1 + abs(self._best[1]))
            self._last = point, loss, gradient = point, wall, torch.zeros_like(point)
        elif loss < self._best[1]:
            self._best = self._last
        for tensor, part in zip(self.tensors, gradient.split([t.numel() for t in self.tensors]), strict=True):
            tensor.grad = part.reshape(tensor.shape).to(tensor.dtype)
        return gradient.new_tensor(loss, dtype=torch.float64)

    def _evaluated(self) -> tuple[Tensor, float, Tensor]:
        with torch.enable_grad():
            loss, found = self.evaluate()
        parts = [torch.zeros_like(t) if g is None else g for t, g in zip(self.tensors, found, strict=True)]
        return self._point(), loss.item(), torch.cat([part.detach().reshape(-1) for part in parts])

    def _point(self) -> Tensor:
        return torch.cat([tensor.detach().reshape(-1) for tensor in self.tensors])

    def _put(self, point: Tensor) -> None:
        with torch.no_grad():
            for tensor, part in zip(
                self.tensors, point.split([t.numel() for t in self.tensors]), strict=True
            ):
                tensor.copy_(part.reshape(tensor.shape))
                tensor.grad = None


def _is_idle(loss: Tensor, tensor: Tensor) -> bool:
    return torch.autograd.grad(loss, tensor, allow_unused=True, retain_graph=True)[0] is None


def _series(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _judged(history: History) -> History:
    """The history, with a warning if the loss was still falling clearly when the steps were used up."""
    tenth = history.steps // 10
    if history.stopped != "finished" or history.steps < _LEAST_STEPS:
        return history
    loss = history["loss"]
    before, after = loss[-2 * tenth : -tenth], loss[-tenth:]
    # Differences of neighbours tell the noise from the trend.
    noise = torch.cat([before, after]).diff().var() / 2
    drop = float(before.mean() - after.mean())
    if not drop > 4 * float((2 * noise / tenth).sqrt()) + 1e-5 * (1 + abs(float(after.mean()))):
        return history
    said = (
        f"the loss was still falling at the end (by {drop:.2g} from the last tenth but one of the steps to the "
        "last): this is no maximum yet; take more steps or a higher learning rate, as in Run(steps="
        f"{4 * history.steps}, lr=1e-2)"
    )
    return replace(history, warnings=(*history.warnings, said))
