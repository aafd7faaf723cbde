"""A learner: a player with its optimiser."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from pgen.problem import Problem
from pgen.training.adam import Adam
from pgen.training.players import Player, Step, copy_into, evaluate
from pgen.training.replays import Context, Replays


class Learner:
    """A player with its optimiser.

    Attributes:
        name: the player's.
        player: its parameters and loss.
        optimizer: moves the parameters. The learning rates that it begins with are those at rate 1.
        clip_norm: the largest norm of a gradient; larger ones are shortened. None: as they are.
        prefix: of the names of its metrics.
        replays: evaluates the loss faster than the player itself, where there is one.
        untouched: parameters that no loss has depended on so far.
    """

    def __init__(
        self,
        name: str,
        player: Player,
        optimizer: Adam | Optimizer,
        clip_norm: float | None = None,
        prefix: str = "",
        replays: Replays | None = None,
    ) -> None:
        self.name, self.player, self.optimizer = name, player, optimizer
        self.clip_norm, self.prefix, self.replays = clip_norm, prefix, replays
        self.tensors = list(player.parameters.values())
        self.rates = [group["lr"] for group in optimizer.param_groups]
        self.untouched = list(player.parameters)
        self.watched = {f"{prefix}{metric}": meaning for metric, meaning in player.watched.items()}
        self._names = f"{prefix}loss", f"{prefix}grad_norm"
        self.watched |= dict(zip(self._names, ("loss", "gradient norm"), strict=True))

    def learn(
        self, batch: Problem, step: Step, rate: float, context: Context = nullcontext
    ) -> dict[str, float | Tensor]:
        """Compute the loss on a batch, differentiate it, move; gives the metrics by their full names."""
        if self.replays is None:
            found = evaluate(self.name, self.player, batch, step, context())
        else:
            found = self.replays(batch, step, context)
        loss_name, norm_name = self._names
        metrics: dict[str, float | Tensor] = {loss_name: found.loss}
        for name, value in found.metrics.items():
            metrics[self.prefix + name] = value
        if found.gradients:
            metrics[norm_name] = self._move(found.gradients, rate)
        return metrics

    def _move(self, gradients: Sequence[Tensor | None], rate: float) -> Tensor:
        for group, base in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = base * rate
        places = set[int]()
        gradients = [
            g if g is None else _own(t, g, places) for t, g in zip(self.tensors, gradients, strict=True)
        ]
        if self.untouched:
            pairs = zip(self.player.parameters, gradients, strict=True)
            touched = {name for name, gradient in pairs if gradient is not None}
            self.untouched = [name for name in self.untouched if name not in touched]
        given = [g for g in gradients if g is not None]
        norm = get_total_norm(given)
        if self.clip_norm is not None:
            shorten(given, self.clip_norm, norm)
        if isinstance(self.optimizer, Adam):
            self.optimizer.step(gradients)
        else:
            for tensor, gradient in zip(self.tensors, gradients, strict=True):
                tensor.grad = gradient
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


@torch.no_grad()
def shorten(gradients: Sequence[Tensor], longest: float, norm: Tensor) -> None:
    """Scale gradients, in place, so that their norm is at most `longest`."""
    if norm.device.type == "cpu" and norm.item() + 1e-6 <= longest:  # on other devices, to look takes longer
        return
    factor = (longest / (norm + 1e-6)).clamp(max=1.0)
    if len({gradient.device for gradient in gradients}) == 1:
        torch._foreach_mul_(list(gradients), factor.to(gradients[0].device))
    else:
        for gradient in gradients:
            gradient.mul_(factor.to(gradient.device))


def _own(tensor: Tensor, gradient: Tensor, places: set[int]) -> Tensor:
    """The gradient in the memory layout of its tensor, and in memory of its own.

    torch's fused Adam on CPU pairs numbers by address. Convolutions of channels-last images, and sums, give gradients
    with strides of their own; `backward` would copy them, `autograd.grad` does not, and the fused step then goes wrong
    in silence (torch 2.13). And a gradient that two tensors share would be clipped twice.
    """
    place = gradient.data_ptr()
    if gradient.stride() != tensor.stride() or place in places:
        gradient = torch.empty_like(tensor).copy_(gradient)
    places.add(place)
    return gradient
