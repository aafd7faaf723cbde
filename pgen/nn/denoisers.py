r"""Networks that denoise: a preconditioning for any network, a perceptron, and denoisers with an energy.

Two calling conventions, and no third:

    network(x, noise[, context])    inside: x `[B, *event]` of unit variance, noise features log(sigma) / 4, `[B]`
    denoiser(x, sigma[, context])   outside: E[x0 | x0 + sigma eps = x], sigma `[B]`

Contexts are `[B, c]` numbers, in which a row with a NaN has no condition: it is replaced by a learned vector.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from pgen.algorithms.diffusion.field import per_row
from pgen.errors import DataError, OptionError
from pgen.nn.embedding import NoiseEmbedding

_FEW = (
    16  # numbers of an event that a width of 64 is enough for: 128 is slower, and no nearer with 100,000 data
)
_DETAIL = 0.1  # finest detail of the data, to begin with
_GAIN = 4.0  # of a perceptron's first layer: at noise 0.05 of a mixture in the plane, errors fall by a fifth to a third


class Preconditioned(nn.Module):
    r"""A denoiser out of any network, whose inputs and targets have unit variance at every noise level.

    .. math:: D(x, \sigma) = m + c_{skip}\,(x - m) + c_{out}\,F(c_{in}\,(x - m), \log(\sigma)/4)

    with, for data of mean m and standard deviation s, and $\tau = \sigma - \sigma_{min}$,

    .. math:: c_{skip} = \frac{s^2}{\tau^2 + s^2},\quad c_{out} = \frac{\tau s}{\sqrt{\sigma^2 + s^2}},\quad
              c_{in} = \frac{1}{\sqrt{\sigma^2 + s^2}}

    Args:
        network: `network(x, noise)` or `network(x, noise, context)`, to the shape of x.
        sigma_data: s, over all scalars of the data.
        mean: m, a number or `[*event]`.
        sigma_min: noise level at and below which values are left as they are: 0 for a denoiser, the least level for a
            consistency model.

    Raises:
        OptionError: sigma_data is not positive, or sigma_min negative.

    References:
        Karras, Aittala, Aila & Laine, NeurIPS 2022; Song, Dhariwal, Chen & Sutskever, ICML 2023 (sigma_min).

    Example:
        >>> denoiser = Preconditioned(DenoiserMLP(2), sigma_data=1.0)
        >>> denoiser(torch.tensor([[2.0, 4.0]]), torch.tensor([1.0]))  # untrained: the denoiser of N(0, 1)
        tensor([[1., 2.]], grad_fn=<AddBackward0>)
    """

    sigma_data: Tensor
    mean: Tensor

    def __init__(
        self,
        network: nn.Module,
        sigma_data: float = 0.5,
        *,
        mean: Tensor | float = 0.0,
        sigma_min: float = 0.0,
    ) -> None:
        super().__init__()
        _check_scale("Preconditioned", sigma_data, sigma_min)
        self.network = network
        self.sigma_min = sigma_min
        self.register_buffer("sigma_data", torch.tensor(float(sigma_data)))
        self.register_buffer("mean", torch.as_tensor(mean, dtype=torch.get_default_dtype()).clone())

    def forward(self, x: Tensor, sigma: Tensor, context: Tensor | None = None) -> Tensor:
        """Denoise x `[B, *event]` at noise levels sigma, `[B]` or one for all."""
        s2, level = self.sigma_data.to(x) ** 2, _one_per_row(sigma, x)
        above = (level - self.sigma_min).clamp(min=0)
        total = torch.rsqrt(level**2 + s2)
        centred = x - self.mean.to(x)
        found = _call(self.network, per_row(total, x) * centred, _feature(level), context)
        skip, out = s2 / (above**2 + s2), above * s2.sqrt() * total
        return self.mean.to(x) + per_row(skip, x) * centred + per_row(out, x) * found


class EnergyDenoiser(nn.Module):
    r"""A denoiser that is the gradient of a scalar: a score field that has an energy, hence a density up to a constant.

    .. math:: D(x, \sigma) = x - \sigma^2 \nabla_x E(x, \sigma),\quad
              E(x, \sigma) = \frac{|x - m|^2}{2 (\sigma^2 + s^2)} + \frac{s}{\sigma} G\Big(\frac{x - m}
              {\sqrt{\sigma^2 + s^2}}, \frac{\log \sigma}{4}\Big)

    -E(., sigma) is the log density of the noisy data up to a constant of each sigma. The scales are those of
    `Preconditioned` with the gradient of -G for the network. Works where gradients are switched off, within vmap, and
    may be differentiated further.

    Args:
        network: G: `network(z, noise[, context])` to one number for each row, `[B]`; or to the shape of z, whose inner
            product with z is then G (so any denoising network is an energy).
        sigma_data: s, over all scalars of the data.
        mean: m, a number or `[*event]`.

    Raises:
        OptionError: sigma_data is not positive.

    References:
        Salimans & Ho, Should EBMs Model the Energy or the Score?, Energy Based Models Workshop, ICLR 2021.
        Du et al., Reduce, Reuse, Recycle: Compositional Generation with Energy-Based Diffusion Models and MCMC, ICML 2023.

    Example:
        >>> denoiser = EnergyDenoiser(DenoiserMLP(2), sigma_data=1.0)
        >>> x, sigma = torch.tensor([[2.0, 4.0]]), torch.tensor([1.0])
        >>> denoiser.energy(x, sigma).detach(), denoiser(x, sigma).detach()
        (tensor([5.0000]), tensor([[1., 2.]]))
    """

    sigma_data: Tensor
    mean: Tensor

    def __init__(self, network: nn.Module, sigma_data: float = 0.5, *, mean: Tensor | float = 0.0) -> None:
        super().__init__()
        _check_scale("EnergyDenoiser", sigma_data, 0.0)
        self.network = network
        self.register_buffer("sigma_data", torch.tensor(float(sigma_data)))
        self.register_buffer("mean", torch.as_tensor(mean, dtype=torch.get_default_dtype()).clone())

    def energy(self, x: Tensor, sigma: Tensor, context: Tensor | None = None) -> Tensor:
        """Minus the log density of noisy data, in nats, up to a constant of each noise level: `[B]`."""
        s, level = self.sigma_data.to(x), _one_per_row(sigma, x)
        z = per_row(torch.rsqrt(level**2 + s**2), x) * (x - self.mean.to(x))
        found = _call(self.network, z, _feature(level), context)
        if x.dim() > 1 and found.shape == z.shape:
            found = (found * z).reshape(len(z), -1).sum(-1)
        return z.reshape(len(z), -1).square().sum(-1) / 2 + s / level.clamp(min=1e-12) * found

    def forward(self, x: Tensor, sigma: Tensor, context: Tensor | None = None) -> Tensor:
        """Denoise x `[B, *event]` at noise levels sigma, `[B]` or one for all."""
        slope = torch.func.grad(lambda x: self.energy(x, sigma, context).sum())(x)
        return x - per_row(_one_per_row(sigma, x) ** 2, x) * slope


class DenoiserMLP(nn.Module):
    r"""A residual perceptron over flattened events, modulated by noise level and context.

    .. math:: h_0 = W z + b,\quad h_{l+1} = h_l + W_l'\,\phi((1 + a_l(e)) \odot W_l \phi(h_l) + b_l(e))

    with e an embedding of noise level and context, from which $a_l$ and $b_l$ are linear; so is the gain of the output.
    The first weights are larger than usual: features that turn within a fraction of a standard deviation, as denoisers
    do at low noise. The output is zero at first.

    Below a noise level $\ell$ that is learned, the finest detail of the data, noise shows nothing new: the network is told
    $\sqrt{\sigma^2 + \ell^2}$ in the place of $\sigma$, and its output multiplied by $\sigma / \sqrt{\sigma^2 + \ell^2}$,
    so that scores have a limit, as those of a smooth density do. Without it they are off by the more the less noise.

    Args:
        event_shape: of x; an int for vectors, () for numbers.
        hidden: width of each residual block. None: three of 64 for events of up to 16 numbers, of 128 for larger ones.
        context: size of a context vector; 0 for none.
        activation: makes one module.
        outputs: length of the output's first dimension; None: that of x.

    Raises:
        OptionError: a size is not a positive whole number.
        DataError: (when called) an event has another shape, or the context is missing or of a wrong size.

    Example:
        >>> net = DenoiserMLP((2, 3), hidden=(32, 32), context=4)
        >>> net(torch.zeros(5, 2, 3), torch.zeros(5), torch.full((5, 4), torch.nan)).shape
        torch.Size([5, 2, 3])
    """

    def __init__(
        self,
        event_shape: int | Sequence[int],
        hidden: Sequence[int] | None = None,
        *,
        context: int = 0,
        activation: Callable[[], nn.Module] = nn.SiLU,
        outputs: int | None = None,
    ) -> None:
        super().__init__()
        self.event_shape = (event_shape,) if isinstance(event_shape, int) else tuple(event_shape)
        size = math.prod(self.event_shape)
        if hidden is None:
            hidden = (64 if size <= _FEW else 128,) * 3
        if (
            min(size, 1 if outputs is None else outputs) < 1
            or not hidden
            or len(set(hidden)) > 1
            or hidden[0] < 1
        ):
            msg = (
                f"DenoiserMLP({self.event_shape}, hidden={tuple(hidden)}): expected an event of one scalar or more and "
                "blocks of one width, e.g. DenoiserMLP(2, hidden=(64, 64, 64))."
            )
            raise OptionError(msg)
        width = hidden[0]
        self.embedding = NoiseEmbedding(width, context)
        self.first = nn.Linear(size, width)
        with torch.no_grad():
            self.first.weight.mul_(_GAIN)
            self.first.bias.mul_(_GAIN)
        self.log_detail = nn.Parameter(torch.tensor(math.log(_DETAIL)))
        self.blocks = nn.ModuleList(_Block(width, activation) for _ in hidden)
        self.gain = nn.Linear(width, width)
        self.output_shape = self.event_shape if outputs is None else (outputs, *self.event_shape[1:])
        self.last = nn.Linear(width, math.prod(self.output_shape))
        for layer in (self.gain, self.last):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, noise: Tensor, context: Tensor | None = None) -> Tensor:
        """Map x `[B, *event]`, noise features log(sigma) / 4 `[B]` and a context `[B, c]` to `[B, *output_shape]`."""
        if x.shape[1:] != self.event_shape:
            raise DataError(
                f"DenoiserMLP got values of shape {tuple(x.shape)}; expected {('B', *self.event_shape)}"
            )
        blunt = torch.logaddexp(8 * noise, 2 * self.log_detail) / 8
        embedded = self.embedding(blunt, context)
        hidden = self.first(x.reshape(len(x), -1))
        for block in self.blocks:
            hidden = block(hidden, embedded)
        found = self.last(hidden * (1 + self.gain(embedded)))
        return (found * (4 * (noise - blunt)).exp().unsqueeze(-1)).reshape(len(x), *self.output_shape)


class _Block(nn.Module):
    """One residual block of two layers, modulated in between."""

    def __init__(self, width: int, activation: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(width, width), nn.Linear(width, width)
        self.modulation = nn.Linear(width, 2 * width)
        self.activation = activation()

    def forward(self, hidden: Tensor, embedded: Tensor) -> Tensor:
        scale, shift = self.modulation(embedded).chunk(2, -1)
        inner = self.inner(self.activation(hidden)) * (1 + scale) + shift
        return hidden + self.outer(self.activation(inner))


def _one_per_row(sigma: Tensor, x: Tensor) -> Tensor:
    """Noise levels `[B]`."""
    return sigma.to(x).expand(x.shape[:1])


def _feature(level: Tensor) -> Tensor:
    """What networks are told of a noise level; finite without noise, where nothing comes of what they say."""
    return level.clamp(min=1e-12).log() / 4


def _call(network: nn.Module, x: Tensor, noise: Tensor, context: Tensor | None) -> Tensor:
    return network(x, noise) if context is None else network(x, noise, context)


def _check_scale(name: str, sigma_data: float, sigma_min: float) -> None:
    if not 0 < sigma_data < math.inf or sigma_min < 0:
        raise OptionError(
            f"{name}(sigma_data={sigma_data}, sigma_min={sigma_min}): expected a positive standard deviation and a "
            "level of 0 or more"
        )
