r"""Networks that give a value one number, its energy: smooth, without batch normalisation.

    E(x) = network(x) + |x - centre|^2 / (2 confinement^2)

Chains follow the gradient of an energy and score matching differentiates it twice, so activations are smooth. An energy of
one row must not depend on the rows beside it, so nothing is normalised over a batch. A network with bounded slope grows at most
linearly; the quadratic term then makes exp(-E) integrable, whatever is learned (a Gaussian base does the same).

References:
    Miyato, Kataoka, Koyama & Yoshida, Spectral normalization for generative adversarial networks, ICLR 2018.
    Du & Mordatch, Implicit generation and modeling with energy-based models, NeurIPS 2019.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from pgen.errors import DataError, OptionError
from pgen.nn.mlp import MLP


def lipschitz(network: nn.Module) -> nn.Module:
    """Hold the largest singular value of every linear map and convolution of a network at 1, by power iteration.

    A convolution's is that of its kernel as a matrix, as in the paper. With SiLU, whose slope is at most 1.1, a network of L
    layers then has a slope of at most 1.1^(L - 1): a bound on how steep an energy can become.

    >>> weight = lipschitz(nn.Linear(3, 3)).weight
    >>> bool(torch.linalg.matrix_norm(weight, 2) < 1.1)
    True
    """
    for layer in network.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            spectral_norm(layer, n_power_iterations=3)
    return network


def without_constant(network: nn.Module) -> nn.Module:
    """A network whose last layer adds nothing: a constant cancels in an energy, and nothing would learn it.

    >>> [name for name, _ in without_constant(nn.Sequential(nn.Linear(2, 3), nn.SiLU(), nn.Linear(3, 1))).named_parameters()]
    ['0.weight', '0.bias', '2.weight']
    """
    layers = [layer for layer in network.modules() if isinstance(layer, nn.Linear)]
    layers[-1].bias = None  # type: ignore[assignment]
    return network


class MLPEnergy(nn.Module):
    r"""A multilayer perceptron as an energy of vectors.

    Args:
        dims: length of a value.
        hidden: widths of the hidden layers.
        activation: makes one module; smooth.
        context: length of a context; 0 for none.
        frequencies: so many random waves `sin(w.x + b)` stand beside the value itself at the input, which helps with
            fine detail in few dimensions; 0 for none.
        detail: length scale of those waves, in the units of the values.
        confinement: width of the quadratic term; None for none, where there is a base.
        spectral: hold the network's layers at singular values of at most 1 (see `lipschitz`); `slope` is then a factor that is
            learned.

    Raises:
        OptionError: a size or a width is not positive.
        DataError: (when called) values of another length.

    Example:
        >>> energy = MLPEnergy(2, hidden=(32,), confinement=4.0)
        >>> energy(torch.zeros(5, 2)).shape
        torch.Size([5])
    """

    waves: Tensor
    phases: Tensor

    def __init__(
        self,
        dims: int,
        hidden: Sequence[int] = (128, 128),
        activation: Callable[[], nn.Module] = nn.SiLU,
        *,
        context: int = 0,
        frequencies: int = 0,
        detail: float = 1.0,
        confinement: float | None = None,
        spectral: bool = False,
    ) -> None:
        super().__init__()
        if frequencies < 0 or not detail > 0 or (confinement is not None and not confinement > 0):
            raise OptionError(
                f"MLPEnergy(frequencies={frequencies}, detail={detail}, confinement={confinement}): a number that is not "
                "negative, and positive widths (or confinement=None)"
            )
        self.dims, self.confinement = dims, confinement
        self.register_buffer("waves", torch.randn(frequencies, dims) / detail)
        self.register_buffer("phases", 2 * math.pi * torch.rand(frequencies))
        network = without_constant(MLP(dims + frequencies, 1, hidden, activation, context=context))
        self.network = lipschitz(network) if spectral else network
        self.slope = nn.Parameter(torch.ones(())) if spectral else None

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Energies `[R]` of values `[R, dims]`, with a context `[R, context]`."""
        if x.shape[-1:] != (self.dims,):
            raise DataError(f"MLPEnergy got values of shape {tuple(x.shape)}; expected [rows, {self.dims}]")
        seen = torch.cat([x, torch.sin(x @ self.waves.mT + self.phases)], -1) if len(self.phases) else x
        energy = self.network(seen, context).squeeze(-1)
        if self.slope is not None:
            energy = self.slope * energy
        if self.confinement is not None:
            energy = energy + x.square().sum(-1) / (2 * self.confinement**2)
        return energy


class ConvEnergy(nn.Module):
    """A small convolutional network as an energy of images: halved until they are 4 pixels or fewer high, then summed up.

    Args:
        shape: height and width of an image; values are `[rows, height, width]` or flat.
        channels: of the first layer; doubled with every halving.
        colours: channels of an image; values are then `[rows, colours, height, width]`.
        outputs: energies of a value; 1 for `[rows]`, more for `[rows, outputs]`: the logits of a classifier.
        confinement: width of the quadratic term; None for none, where there is a base.
        spectral: hold layers at singular values of at most 1, with a factor that is learned.

    Raises:
        OptionError: a size or a width is not positive.
        DataError: (when called) values of another size.

    Example:
        >>> ConvEnergy((8, 8))(torch.zeros(5, 8, 8)).shape, ConvEnergy((28, 28), outputs=10)(torch.zeros(5, 784)).shape
        (torch.Size([5]), torch.Size([5, 10]))
    """

    def __init__(
        self,
        shape: tuple[int, int],
        channels: int = 32,
        *,
        colours: int = 1,
        outputs: int = 1,
        confinement: float | None = None,
        spectral: bool = False,
    ) -> None:
        super().__init__()
        if min(*shape, channels, colours, outputs) < 1 or (confinement is not None and not confinement > 0):
            raise OptionError(
                f"ConvEnergy({shape}, channels={channels}, colours={colours}, outputs={outputs}, confinement={confinement}): "
                "sizes and widths are positive, e.g. ConvEnergy((8, 8))"
            )
        self.shape, self.colours, self.outputs, self.confinement = shape, colours, outputs, confinement
        layers: list[nn.Module] = [nn.Conv2d(colours, channels, 3, padding=1), nn.SiLU()]
        height, width = shape
        while height > 4:
            layers += [nn.Conv2d(channels, 2 * channels, 4, stride=2, padding=1), nn.SiLU()]
            channels, height, width = 2 * channels, height // 2, max(1, width // 2)
        layers += [
            nn.Flatten(),
            nn.Linear(channels * height * width, 128),
            nn.SiLU(),
            nn.Linear(128, outputs, bias=outputs > 1),  # a constant of a single energy means nothing
        ]
        self.network = lipschitz(nn.Sequential(*layers)) if spectral else nn.Sequential(*layers)
        self.slope = nn.Parameter(torch.ones(())) if spectral else None

    def forward(self, x: Tensor) -> Tensor:
        """Energies of images."""
        if x[0].numel() != self.colours * self.shape[0] * self.shape[1]:
            raise DataError(
                f"ConvEnergy got values of shape {tuple(x.shape)}; expected {self.colours} x {self.shape} numbers in a row"
            )
        energy = self.network(x.reshape(len(x), self.colours, *self.shape))
        if self.slope is not None:
            energy = self.slope * energy
        if self.confinement is not None:
            energy = energy + x.reshape(len(x), -1).square().sum(1, keepdim=True) / (2 * self.confinement**2)
        return energy.squeeze(-1) if self.outputs == 1 else energy
