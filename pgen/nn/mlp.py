"""A multilayer perceptron over the last dimension, with an optional context and an optional linear skip."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from pgen.errors import DataError, OptionError


class MLP(nn.Module):
    r"""A multilayer perceptron acting on the last dimension of its input.

    .. math:: f(x, c) = W_L\,\sigma(\cdots\sigma(W_1 [x, c] + b_1)\cdots) + b_L + [\text{skip}]\; S [x, c]

    Every leading dimension is a batch dimension; those of `x` and `c` broadcast against each other. With
    `skip`, every affine map is reached exactly (by a zero last layer), however narrow the hidden layers are.

    Args:
        features: size of the last dimension of the input.
        outputs: size of the last dimension of the output.
        hidden: widths of the hidden layers; empty for an affine map.
        activation: makes one module, for instance a class such as `torch.nn.SiLU`.
        context: size of the last dimension of a second input, concatenated to the first; 0 for none.
        skip: whether a linear map of the inputs is added to the output.

    Raises:
        OptionError: a size is not a positive whole number.
        DataError: (when called) the last dimension of an input has the wrong size, or the context is missing.

    Example:
        >>> import torch
        >>> net = MLP(3, 2, hidden=(16,), context=4, skip=True)
        >>> net(torch.zeros(5, 1, 3), torch.zeros(7, 4)).shape
        torch.Size([5, 7, 2])
    """

    def __init__(
        self,
        features: int,
        outputs: int,
        hidden: Sequence[int] = (128, 128),
        activation: Callable[[], nn.Module] = nn.SiLU,
        *,
        context: int = 0,
        skip: bool = False,
    ) -> None:
        super().__init__()
        _check_sizes(features, outputs, hidden, context)
        self.features = features
        self.outputs = outputs
        self.context = context
        widths = (features + context, *hidden, outputs)
        layers: list[nn.Module] = []
        for width, following in pairwise(widths):
            layers += [nn.Linear(width, following), activation()]
        self.layers = nn.Sequential(*layers[:-1])
        self.skip = nn.Linear(features + context, outputs, bias=False) if skip and hidden else None

    @property
    def last(self) -> nn.Linear:
        """The last affine layer, for those who want to choose its first values."""
        layer = self.layers[-1]
        if not isinstance(layer, nn.Linear):
            msg = f"the last layer of this MLP was replaced by a {type(layer).__name__}; expected a Linear."
            raise OptionError(msg)
        return layer

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Map `x` [..., features] and `context` [..., context] to [..., outputs]."""
        if x.shape[-1:] != (self.features,):
            msg = (
                f"MLP got an input of shape {tuple(x.shape)}; expected [..., {self.features}]. "
                "Flatten event dimensions first, e.g. x.flatten(-2)."
            )
            raise DataError(msg)
        if self.context or context is not None:
            x = self._with_context(x, context)
        y = self.layers(x)
        return y if self.skip is None else y + self.skip(x)

    def _with_context(self, x: Tensor, context: Tensor | None) -> Tensor:
        if context is None or context.shape[-1:] != (self.context,):
            got = "none" if context is None else f"one of shape {tuple(context.shape)}"
            wanted = f"[..., {self.context}]" if self.context else "none"
            msg = (
                f"MLP got {got} as context; expected {wanted}: MLP(..., context={self.context})(x, context)."
            )
            raise DataError(msg)
        batch = np.broadcast_shapes(x.shape[:-1], context.shape[:-1])
        return torch.cat([x.expand(*batch, -1), context.expand(*batch, -1)], dim=-1)


def _check_sizes(features: int, outputs: int, hidden: Sequence[int], context: int) -> None:
    """Raise unless every width is a positive whole number (and the context a non-negative one)."""
    if (
        features + context < 1
        or min(features, context) < 0
        or outputs < 1
        or any(width < 1 for width in hidden)
    ):
        msg = (
            f"MLP(features={features}, outputs={outputs}, hidden={tuple(hidden)}, context={context}): "
            "sizes must be positive whole numbers, e.g. MLP(2, 1, hidden=(64, 64))."
        )
        raise OptionError(msg)
