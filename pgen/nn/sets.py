"""A summary of an exchangeable set of any size."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from pgen.errors import DataError, OptionError
from pgen.nn.mlp import MLP


class DeepSet(nn.Module):
    r"""Summarise a set by means over its elements, and its size.

    .. math:: s(x_1, \dots, x_n) = [\overline{\phi(x_i)},\; \overline{x_i},\; \log(n / n_0)]

    with an `MLP` for $\phi$. The summary does not depend on the order of the elements and works for every
    size. The plain mean is kept beside the learned one, so that what follows has the exact statistic of a
    Gaussian mean from the start.

    Args:
        features: size of an element.
        learned: number of learned statistics, the outputs of $\phi$.
        hidden: widths of the hidden layers of $\phi$.
        activation: makes one module, for instance a class such as `torch.nn.SiLU`.
        size: the usual size $n_0$, kept as a buffer: where all sets seen in training have it, the last
            statistic is zero there, and what follows does not come to lean on it.

    Attributes:
        outputs: size of the summary, `learned + features + 1`.

    Raises:
        DataError: (when called) the set is empty, or an element has the wrong size.

    References:
        Zaheer, Kottur, Ravanbakhsh, Poczos, Salakhutdinov, Smola: Deep sets (NeurIPS 2017).

    Example:
        >>> import torch
        >>> net = DeepSet(2, learned=5, hidden=(16,))
        >>> net(torch.zeros(4, 7, 2)).shape, net(torch.zeros(4, 9, 2)).shape
        (torch.Size([4, 8]), torch.Size([4, 8]))
    """

    size: Tensor

    def __init__(
        self,
        features: int,
        learned: int = 32,
        hidden: Sequence[int] = (64,),
        activation: Callable[[], nn.Module] = nn.SiLU,
        *,
        size: int = 1,
    ) -> None:
        super().__init__()
        if size < 1:
            msg = f"DeepSet(size={size}): expected the usual number of elements, 1 or more."
            raise OptionError(msg)
        self.element = MLP(features, learned, hidden, activation)
        self.register_buffer("size", torch.tensor(float(size)))
        self.outputs = learned + features + 1

    def forward(self, x: Tensor, dim: int = -2) -> Tensor:
        """Summarise `x` [..., n, ..., features] over the (negative) dimension `dim`: [..., ..., outputs]."""
        if not -x.ndim <= dim < -1 or not x.shape[dim]:
            msg = (
                f"DeepSet got shape {tuple(x.shape)} and dim={dim}; expected "
                f"[..., n, ..., {self.element.features}] with n >= 1 elements along a dimension before the "
                "last, counted from the right (dim=-2 or less)."
            )
            raise DataError(msg)
        means = [self.element(x).mean(dim), x.mean(dim)]
        count = (x.shape[dim] / self.size).log()
        return torch.cat([*means, count.expand(*means[0].shape[:-1], 1)], dim=-1)
