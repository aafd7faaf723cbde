"""Adam and AdamW, one kernel for all tensors: what `torch.optim` has, without what surrounds it.

    m <- b1 m + (1 - b1) g        v <- b2 v + (1 - b2) g^2
    x <- x - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

Weight decay adds to the gradient (Adam) or shrinks x by itself (AdamW). `torch.optim` imports torch's compiler when the
first optimiser is made (over a second) and asks every parameter for its state at every step (a tenth of the step of a
small network). The numbers are those of `torch.optim.Adam(..., fused=True)`, and so is the layout of the saved state.

References:
    Adam: a method for stochastic optimization (Kingma & Ba, ICLR 2015). Decoupled weight decay regularization
    (Loshchilov & Hutter, ICLR 2019).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

BETAS, EPS = (0.9, 0.999), 1e-8
_NAMES = ("exp_avg", "exp_avg_sq", "step")


class Adam:
    """Moves tensors on the CPU or on CUDA devices, given their gradients.

    Attributes:
        param_groups: one group with the learning rate, `lr`, which may be changed between steps.

    Example:
        >>> x = torch.tensor([1.0, -2.0])
        >>> adam = Adam([x], lr=0.5)
        >>> adam.step([torch.tensor([3.0, -0.1])])
        >>> x  # the first step goes by the learning rate, whatever the size of the gradient
        tensor([ 0.5000, -1.5000])
    """

    def __init__(
        self, tensors: Sequence[Tensor], lr: float, weight_decay: float = 0.0, decoupled: bool = False
    ) -> None:
        """Begin without a memory of gradients.

        Args:
            tensors: moved in place.
            lr: learning rate.
            weight_decay: its factor.
            decoupled: weights decay by themselves (AdamW).
        """
        self.tensors = list(tensors)
        self.param_groups: list[dict[str, Any]] = [
            {"params": self.tensors, "lr": lr, "weight_decay": weight_decay}
        ]
        self._kernel = torch._fused_adamw_ if decoupled else torch._fused_adam_
        self._state: dict[str, list[Tensor]] = {
            "exp_avg": [
                torch.zeros_like(t, memory_format=torch.preserve_format).detach() for t in self.tensors
            ],
            "exp_avg_sq": [
                torch.zeros_like(t, memory_format=torch.preserve_format).detach() for t in self.tensors
            ],
            "step": [torch.zeros((), dtype=torch.float32, device=t.device) for t in self.tensors],
        }
        places: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        for i, tensor in enumerate(self.tensors):
            places.setdefault((tensor.device, tensor.dtype), []).append(i)
        self._places = list(places.values())  # a kernel takes tensors of one kind

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor | None]) -> None:
        """Move the tensors that have a gradient, which must have the memory layout of its tensor."""
        lr, decay = self.param_groups[0]["lr"], self.param_groups[0]["weight_decay"]
        for places in self._places:
            given = [(i, gradient) for i in places if (gradient := gradients[i]) is not None]
            if not given:
                continue
            averages, squares, steps = ([self._state[name][i] for i, _ in given] for name in _NAMES)
            none: list[Tensor] = []
            torch._foreach_add_(steps, 1)
            self._kernel(
                [self.tensors[i] for i, _ in given], [gradient for _, gradient in given], averages, squares, none, steps,
                lr=lr, beta1=BETAS[0], beta2=BETAS[1], weight_decay=decay, eps=EPS, amsgrad=False, maximize=False,
            )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """As `torch.optim.Adam` has it; the tensors are the live ones."""
        state = {i: {name: self._state[name][i] for name in _NAMES} for i in range(len(self.tensors))}
        options = {key: value for key, value in self.param_groups[0].items() if key != "params"}
        return {"state": state, "param_groups": [{**options, "params": list(range(len(self.tensors)))}]}

    @torch.no_grad()
    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take over a saved state, by value; a tensor that it lacks begins anew.

        Raises:
            ValueError: a tensor of another shape.
        """
        self.param_groups[0]["lr"] = saved["param_groups"][0]["lr"]
        for i, tensor in enumerate(self.tensors):
            state = saved["state"].get(i, {})
            for name in _NAMES:
                own = self._state[name][i]
                value = state.get(name)
                if value is not None and value.shape != own.shape:
                    raise ValueError(
                        f"optimiser state {name!r} of a tensor of shape {tuple(tensor.shape)}: expected shape "
                        f"{tuple(own.shape)}, found {tuple(value.shape)}"
                    )
                own.copy_(value) if value is not None else own.zero_()
