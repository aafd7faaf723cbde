"""Who optimises what: a player has parameters and a loss, which is differentiated on a batch at every step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from pgen.errors import ProgramError
from pgen.problem import Problem


@dataclass(frozen=True)
class Step:
    """Which step a loss is asked for.

    A loss is run once and replayed (see `pgen.training.replays`), so it must not turn on numbers that torch does not
    see. A schedule is a function of `number`, a tensor; one that reads `index` is never replayed.

    Attributes:
        index: the step, from 0.
        steps: how many there will be, for annealing.
        training: False where the loss is computed on held-out data, only to be looked at.

    Example:
        >>> step = Step(3, 10)
        >>> (step.number / step.steps).clamp(max=1.0)
        tensor(0.3000)
    """

    index: int
    steps: int
    training: bool = True

    @property
    def first(self) -> bool:
        """Whether nothing was learned yet. The first step is never replayed: it is the one to check the data in."""
        return self.index == 0

    @property
    def number(self) -> Tensor:
        """The index as a tensor of no dimensions, which replays renew."""
        return torch.tensor(float(self.index))

    def as_written(self, why: str) -> None:
        """Ask a loss not to be replayed, for a reason that completes "it ...": a replay would do something else."""


@dataclass(frozen=True)
class Player:
    """One party of the optimisation, with a loss of its own.

    Attributes:
        parameters: leaf tensors by name, trained in place. No tensor belongs to two players.
        loss: from a batch and a step to the loss, in nats per row, and metrics to record (numbers or tensors
            of one element). A loss that requires no gradient means that the player sits this step out.
        watched: metrics that must stay finite, besides the loss, by name, each with its meaning.
        within: from a step to the context in which the loss is run *and differentiated*, such as that which lends the
            parameters to the user's modules: what is evaluated anew on the way back (`torch.utils.checkpoint`) has to find
            them there, or its gradient is silently another one.
    """

    parameters: Mapping[str, Tensor]
    loss: Callable[[Problem, Step], tuple[Tensor, Mapping[str, float | Tensor]]]
    watched: Mapping[str, str] = field(default_factory=dict)
    within: Callable[[Step], AbstractContextManager[Any]] = lambda step: nullcontext()


class Evaluation(NamedTuple):
    """A loss with its metrics and its gradient, none of them part of a graph, or a view of a parameter.

    Attributes:
        loss: one number.
        metrics: by name.
        gradients: of each parameter, None for those that the loss does not depend on; empty if it depends on none.
    """

    loss: Tensor
    metrics: Mapping[str, float | Tensor]
    gradients: Sequence[Tensor | None]


def evaluate(
    name: str, player: Player, batch: Problem, step: Step, context: AbstractContextManager[Any]
) -> Evaluation:
    """Run a player's loss on a batch, in a context, and differentiate it.

    Raises:
        ProgramError: the loss is not one number.
    """
    with context, player.within(step):
        loss, metrics = player.loss(batch, step)
        if loss.ndim:
            raise ProgramError(
                f"the loss of player {name!r} has shape {tuple(loss.shape)}; expected one number, the "
                "mean over the rows of the batch: loss.mean()"
            )
        # Copies, since a metric may be a view of a parameter, which is about to change in place.
        found = {name: m.detach().clone() if isinstance(m, Tensor) else m for name, m in metrics.items()}
        if not loss.requires_grad:
            return Evaluation(loss.clone(), found, ())
        gradients = torch.autograd.grad(loss, list(player.parameters.values()), allow_unused=True)
        return Evaluation(loss.detach().clone(), found, gradients)


def require_trainable(players: Mapping[str, Player]) -> None:
    """Refuse parameters that cannot be trained, or that two players would train."""
    owners: dict[int, str] = {}
    for who, player in players.items():
        for name, tensor in player.parameters.items():
            if not tensor.is_leaf or not tensor.is_floating_point():
                kind = "the result of a computation" if tensor.is_floating_point() else str(tensor.dtype)
                raise ProgramError(
                    f"player {who!r}: parameter {name!r} is {kind}; expected a leaf tensor of floating-point "
                    "numbers, for example tensor.detach().clone().requires_grad_()"
                )
            if id(tensor) in owners:
                raise ProgramError(
                    f"parameter {name!r} belongs to the players {owners[id(tensor)]!r} and {who!r}; "
                    "expected one owner, or two optimisers would move it"
                )
            owners[id(tensor)] = who
            tensor.requires_grad_()


def move(tensors: Mapping[str, Tensor], device: torch.device | None, dtype: torch.dtype | None) -> None:
    """Move tensors in place, as `nn.Module.to` does, so that all who hold them see it."""
    for tensor in tensors.values():
        cast = dtype if tensor.is_floating_point() else None
        moved = tensor.detach().to(device=device, dtype=cast)
        if moved.device != tensor.device or moved.dtype != tensor.dtype:
            tensor.data = moved


def clone(tree: Any) -> Any:
    """Nested state with tensors of its own."""
    if isinstance(tree, Tensor):
        return tree.detach().clone()
    if isinstance(tree, Mapping):
        return {key: clone(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(clone(value) for value in tree)
    return tree


@torch.no_grad()
def copy_into(targets: Mapping[str, Tensor], sources: Mapping[str, Tensor]) -> None:
    """Overwrite tensors in place with those of the same names, which must have the same shapes and dtypes."""
    if targets.keys() != sources.keys():
        raise ValueError(f"expected the tensors {sorted(targets)}, found {sorted(sources)}")
    for name, target in targets.items():
        source = sources[name]
        if target.shape != source.shape or target.dtype != source.dtype:
            raise ValueError(
                f"tensor {name!r}: expected {target.dtype} of shape {tuple(target.shape)}, "
                f"found {source.dtype} of shape {tuple(source.shape)}"
            )
        target.copy_(source)


def finite(tensors: Sequence[Tensor]) -> bool:
    """Whether all numbers are finite, with one wait for the device."""
    return bool(torch.isfinite(get_total_norm([tensor.detach() for tensor in tensors])))
