"""Who optimises what: a player has parameters and a loss, a learner is a player with its optimiser."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from pgen.errors import ProgramError
from pgen.problem import Problem


@dataclass(frozen=True)
class Step:
    """Which step a loss is asked for.

    Attributes:
        index: the step, from 0.
        steps: how many there will be, for annealing.
        training: False where the loss is computed on held-out data, only to be looked at.
    """

    index: int
    steps: int
    training: bool = True


@dataclass(frozen=True)
class Player:
    """One party of the optimisation, with a loss of its own.

    Attributes:
        parameters: leaf tensors by name, trained in place. No tensor belongs to two players.
        loss: from a batch and a step to the loss, in nats per row, and metrics to record (numbers or tensors
            of one element). A loss that requires no gradient means that the player sits this step out.
    """

    parameters: Mapping[str, Tensor]
    loss: Callable[[Problem, Step], tuple[Tensor, Mapping[str, float | Tensor]]]


class Learner:
    """A player with its optimiser.

    Attributes:
        name: the player's.
        player: its parameters and loss.
        optimizer: moves the parameters. The learning rates that it begins with are those at rate 1.
        clip_norm: the largest norm of a gradient; larger ones are shortened. None: as they are.
        prefix: of the names of its metrics.
        untouched: parameters that no loss has depended on so far.
    """

    def __init__(
        self,
        name: str,
        player: Player,
        optimizer: Optimizer,
        clip_norm: float | None = None,
        prefix: str = "",
    ) -> None:
        self.name, self.player, self.optimizer = name, player, optimizer
        self.clip_norm, self.prefix = clip_norm, prefix
        self.tensors = list(player.parameters.values())
        self.rates = [group["lr"] for group in optimizer.param_groups]
        self.untouched = list(player.parameters)
        self.watched = {f"{prefix}loss": "loss", f"{prefix}grad_norm": "gradient norm"}

    def learn(
        self, batch: Problem, step: Step, rate: float, context: AbstractContextManager[Any]
    ) -> dict[str, float | Tensor]:
        """Compute the loss on a batch, differentiate it, move; gives the metrics by their full names."""
        with context:
            loss, metrics = self.player.loss(batch, step)
        if loss.ndim:
            raise ProgramError(
                f"the loss of player {self.name!r} has shape {tuple(loss.shape)}; expected one number, the "
                "mean over the rows of the batch: loss.mean()"
            )
        loss_name, norm_name = self.watched
        # Copies, since a metric may be a view of a parameter, which is about to change in place.
        found = {self.prefix + name: _copy(value) for name, value in metrics.items()}
        found = {loss_name: _copy(loss), **found}
        if loss.requires_grad:
            found[norm_name] = self._move(loss, rate)
        return found

    def _move(self, loss: Tensor, rate: float) -> Tensor:
        for group, base in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = base * rate
        gradients = torch.autograd.grad(loss, self.tensors, allow_unused=True)
        gradients = [_laid_out_as(t, g) for t, g in zip(self.tensors, gradients, strict=True)]
        for tensor, gradient in zip(self.tensors, gradients, strict=True):
            tensor.grad = gradient
        if self.untouched:
            self.untouched = [name for name in self.untouched if self.player.parameters[name].grad is None]
        norm = get_total_norm([g for g in gradients if g is not None])
        if self.clip_norm is not None:
            clip_grads_with_norm_(self.tensors, self.clip_norm, norm)
        self.optimizer.step()
        return norm

    def release(self) -> None:
        """Free the gradients."""
        for tensor in self.tensors:
            tensor.grad = None

    def state(self) -> dict[str, Any]:
        """Everything that learning changes; the tensors are the live ones."""
        return {
            "parameters": dict(self.player.parameters),
            "optimizer": self.optimizer.state_dict(),
            "untouched": list(self.untouched),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go back to a state, which can be used again."""
        copy_into(self.player.parameters, state["parameters"])
        self._require_shapes(state["optimizer"]["state"])
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        self.untouched = [name for name in self.player.parameters if name in state["untouched"]]

    def _require_shapes(self, states: Mapping[int, Mapping[str, Any]]) -> None:
        """Fused kernels trust their caller: a state of another shape would make them read foreign memory."""
        if not any(group.get("fused") for group in self.optimizer.param_groups):
            return
        tensors = [tensor for group in self.optimizer.param_groups for tensor in group["params"]]
        for i, state in states.items():
            for name, value in state.items():
                if isinstance(value, Tensor) and value.ndim and value.shape != tensors[i].shape:
                    found = f"found {tuple(value.shape)}"
                    raise ValueError(
                        f"optimiser state {name!r}: expected shape {tuple(tensors[i].shape)}, {found}"
                    )


def _laid_out_as(tensor: Tensor, gradient: Tensor | None) -> Tensor | None:
    """The gradient in the memory layout of its tensor: torch's fused Adam on CPU pairs numbers by address.

    Convolutions of channels-last images, and sums, give gradients with strides of their own; `backward` would
    copy them, `autograd.grad` does not, and the fused step then goes wrong in silence (torch 2.13).
    """
    if gradient is None or gradient.stride() == tensor.stride():
        return gradient
    return torch.empty_like(tensor).copy_(gradient)


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


def _copy(value: float | Tensor) -> float | Tensor:
    return value.detach().clone() if isinstance(value, Tensor) else value


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
