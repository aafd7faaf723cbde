r"""A law that is drawn from in one pass: a network of normal latents, with normal noise on its coordinates.

    u = g(e) + sigma noise,     e ~ N(0, 1) [k],    u standardised unconstrained coordinates [d]

It has a density, int N(u; g(e), sigma^2) N(e; 0, 1) de, that is known only by estimates: its gradient, the score, is

    s(u) = E_q(e' | u)[g(e') - u] / sigma^2

by self-normalised importance sampling (`origins`), with candidates e' of two kinds. Some lie around the latent that u was made
of: the paper gives them one width, which in ten dimensions already misses; here they have the normal law that would be the
posterior if g were straight there, at the price of d derivatives. They see one sheet of the generator only, and one that folds
over itself would seem to have more entropy than it has, and would learn to fold. So others are independent draws of e, the
same for all rows, which in few dimensions find the other sheets. All have the weights of the mixture of both laws.

References:
    Grathwohl, Kelly, Hashemi, Norouzi, Swersky & Duvenaud, No MCMC for me: amortized sampling for fast and stable training of
    energy-based models, ICLR 2021: candidates around the known latent.
    Yin & Zhou, Semi-implicit variational inference, ICML 2018: candidates that are draws of e.
    Owen & Zhou, Safe and effective importance sampling, JASA 95, 2000: weights of a mixture.
    Tierney & Kadane, Accurate approximations for posterior moments and marginal densities, JASA 81, 1986: the normal law.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pgen.algorithms.energy.learning import Frame
from pgen.algorithms.energy.space import Space

NARROWEST, WIDEST = 0.01, 0.3
"""Bounds of the noise, in standard deviations of the data."""
_NOTHING = 80.0  # nats below the largest weight
_LOG_ROOT = math.log(2 * math.pi) / 2


class Drawn(NamedTuple):
    """Draws of a generator.

    Attributes:
        latent: e, `[n, k]`.
        u: standardised unconstrained coordinates `[n, d]`, differentiable in the generator.
    """

    latent: Tensor
    u: Tensor


class Origins(NamedTuple):
    """What draws say of the law that they are of.

    Attributes:
        score: gradient of its log density, `[n, d]`.
        log_prob: its log density `[n]`, in standardised coordinates; low, if anything, as the logarithm of an unbiased estimate.
        used: effective number of candidates for a draw, `[]`.
    """

    score: Tensor
    log_prob: Tensor
    used: Tensor


class Residual(nn.Module):
    """A linear map plus a network that begins at zero, so that it begins as a normal law of a given covariance.

    Args:
        latents: k.
        root: of the covariance, lower triangular `[d, d]`; its first k columns are those of the map.
        hidden: widths of the network's layers.
    """

    def __init__(self, latents: int, root: Tensor, hidden: tuple[int, ...]) -> None:
        super().__init__()
        layers = list[nn.Module]()
        for i, o in pairwise((latents, *hidden)):
            layers += [nn.Linear(i, o), nn.SiLU()]
        last = nn.Linear((latents, *hidden)[-1], len(root))
        self.linear = nn.Linear(latents, len(root)).to(root)
        self.network = nn.Sequential(*layers, last).to(root)
        with torch.no_grad():
            for zero in (last.weight, last.bias, self.linear.weight, self.linear.bias):
                zero.zero_()
            shared = min(latents, len(root))
            self.linear.weight[:, :shared] = root[:, :shared]

    def forward(self, e: Tensor) -> Tensor:
        """Coordinates `[n, d]` of latents `[n, k]`."""
        return self.linear(e) + self.network(e)


class Generator(nn.Module):
    """Normal latents through a network, and noise.

    Args:
        data: `[N, *event]`, which give the units, and the normal law that it begins as.
        space: of the values.
        network: latents `[n, k]` to standardised unconstrained coordinates `[n, d]`; None for a `Residual`.
        latents: k; None for d.
        hidden: widths of the layers of a network that is made.

    Attributes:
        frame: in whose units coordinates are.

    Raises:
        ValueError: some numbers are counted, or the network makes coordinates of another shape.

    Example:
        >>> from torch.distributions import constraints
        >>> x = torch.tensor([[1.0], [2.0], [4.0]])
        >>> law = Generator(x, Space.of(constraints.positive, (1,)), hidden=(8,))
        >>> law.sample(1000).log().mean().round(decimals=1), x.log().mean().round(decimals=1)
        (tensor(0.7000), tensor(0.7000))
    """

    def __init__(
        self,
        data: Tensor,
        space: Space,
        network: nn.Module | None = None,
        latents: int | None = None,
        hidden: tuple[int, ...] = (128, 128),
    ) -> None:
        super().__init__()
        if space.cardinalities:
            raise ValueError(
                "a generator follows the slope of the energy at its draws, and the space has numbers that are counted; use "
                "PersistentContrastiveDivergence or NoiseContrastive"
            )
        self.frame, self.latents = Frame(data, space), space.dims if latents is None else latents
        if network is None:
            u = self.standardised(data.detach())
            share = min(1.0, space.dims / len(u)) if space.dims > 1 else 0.0  # as a `Reference` has it
            covariance = (1 - share) * u.mT @ u / (len(u) - 1) + (share + 1e-6) * torch.eye(space.dims).to(u)
            network = Residual(self.latents, torch.linalg.cholesky(covariance), hidden)
        self.network = network
        like = self.frame.centre
        self.free_sigma = nn.Parameter(torch.zeros((), dtype=like.dtype, device=like.device))
        with torch.no_grad():
            made = tuple(self.network(like.new_zeros(2, self.latents)).shape)
        if made != (2, space.dims):
            raise ValueError(
                f"a generator maps latents [n, {self.latents}] to coordinates [n, {space.dims}]; it made {list(made)} of "
                f"[2, {self.latents}]. Expected a module such as torch.nn.Linear({self.latents}, {space.dims}), with latents="
                f"{self.latents}"
            )

    @property
    def sigma(self) -> Tensor:
        """Standard deviation of the noise `[]`, learned between its bounds."""
        return NARROWEST * (WIDEST / NARROWEST) ** self.free_sigma.sigmoid()

    def draw(self, n: int) -> Drawn:
        """Draws, differentiable in the generator."""
        like = self.frame.centre
        e = torch.randn(n, self.latents, dtype=like.dtype, device=like.device)
        made = self.network(e)
        return Drawn(e, made + self.sigma * torch.randn_like(made))

    @torch.no_grad()
    def sample(self, n: int) -> Tensor:
        """Draws `[n, *event]`."""
        return self.values(self.draw(n).u)

    def standardised(self, x: Tensor) -> Tensor:
        """Coordinates `[n, d]` of values `[n, *event]`."""
        return (self.frame.space.apart(x)[0] - self.frame.centre) / self.frame.scale

    def values(self, u: Tensor) -> Tensor:
        """Values `[n, *event]` of coordinates `[n, d]`."""
        none = torch.empty(len(u), 0, dtype=torch.long, device=u.device)
        return self.frame.space.together(self.frame.centre + self.frame.scale * u, none)

    def volume(self, u: Tensor) -> Tensor:
        """Log determinant `[n]` of the change from coordinates to values."""
        return (
            self.frame.space.volume(self.frame.centre + self.frame.scale * u) + self.frame.scale.log().sum()
        )

    @torch.no_grad()
    def origins(self, drawn: Drawn, around: int, anywhere: int) -> Origins:
        """Score and log density at draws, by so many candidates around their latents, and so many anywhere.

        All estimates are consistent in the number of either.
        """
        u, sigma = drawn.u, self.sigma
        made_near, made_far, log_weight = self._candidates(drawn, around, anywhere)
        weight = log_weight.softmax(1)
        mean = (weight[:, :around].unsqueeze(2) * made_near).sum(1) + weight[:, around:] @ made_far
        used = 1 / weight.square().sum(1).mean()
        return Origins((mean - u) / sigma**2, self._density(log_weight, u), used)

    def log_prob(self, drawn: Drawn, around: int, anywhere: int) -> Tensor:
        """Log density `[n]` of coordinates `[n, d]`; low, if anything. Its exponential is right in the mean.

        Candidates around a latent that has nothing to do with the coordinates are of no use, and do no harm. The gradient in
        the generator is that of the log likelihood, by importance sampling.
        """
        return self._density(self._candidates(drawn, around, anywhere)[2], drawn.u)

    def inferred(self, drawn: Drawn) -> Drawn:
        """Coordinates with latents that are nearer to those they may be made of: one step of Gauss and Newton."""
        return Drawn(self._posterior(drawn)[0], drawn.u)

    def _density(self, log_weight: Tensor, u: Tensor) -> Tensor:
        return log_weight.logsumexp(1) - u.shape[1] * (self.sigma.log() + _LOG_ROOT)

    def _candidates(self, drawn: Drawn, around: int, anywhere: int) -> tuple[Tensor, Tensor, Tensor]:
        """Means of candidates, `[n, around, d]` and `[anywhere, d]`, and their log weights `[n, around + anywhere]`."""
        e, u = drawn.latent, drawn.u
        (n, k), d = e.shape, u.shape[1]
        far = torch.randn(anywhere, k, dtype=e.dtype, device=e.device)
        prior_far = (-far.square().sum(1) / 2).expand(n, anywhere)
        if not around:
            made = self.network(far)
            log_weight = -_log(anywhere) - _apart(u, made) / (2 * self.sigma**2)
            return u.new_zeros(n, 0, d), made, log_weight
        centre, root = self._posterior(drawn)
        z = torch.randn(n, around, k, dtype=e.dtype, device=e.device)
        near = centre.unsqueeze(1) + torch.linalg.solve_triangular(root.mT, z.mT, upper=True).mT
        made = self.network(torch.cat([near.reshape(-1, k), far]))
        made_near, made_far = made[: n * around].reshape(n, around, d), made[n * around :]
        # Log densities of each candidate: as a draw of e, as one around it, and of u given it.
        prior = torch.cat([-near.square().sum(2) / 2, prior_far], 1)
        white = torch.cat([z, (far - centre.unsqueeze(1)) @ root], 1)
        beside = root.diagonal(dim1=1, dim2=2).log().sum(1, keepdim=True) - white.square().sum(2) / 2
        law = torch.logaddexp(beside + _log(around), prior + _log(anywhere))
        miss = torch.cat([(u.unsqueeze(1) - made_near).square().sum(2), _apart(u, made_far)], 1)
        return made_near, made_far, prior - law - miss / (2 * self.sigma**2)

    def _posterior(self, drawn: Drawn) -> tuple[Tensor, Tensor]:
        """Means `[n, k]` and roots of precisions `[n, k, k]` of latents, were the network straight around those drawn."""
        sigma = self.sigma.detach()
        with torch.enable_grad():
            e = drawn.latent.detach().requires_grad_()
            made = self.network(e)
            slope = torch.stack(
                [torch.autograd.grad(column.sum(), e, retain_graph=True)[0] for column in made.unbind(1)], 1
            )
        e, slope = e.detach(), slope / sigma
        precision = torch.eye(e.shape[1]).to(e) + slope.mT @ slope
        # In single precision a steep network's would be no longer positive.
        precision = precision + 1e-5 * torch.diag_embed(precision.diagonal(dim1=1, dim2=2))
        root = torch.linalg.cholesky_ex(precision)[0]
        pull = slope.mT @ ((drawn.u.detach() - made.detach()) / sigma).unsqueeze(2) - e.unsqueeze(2)
        return e + torch.cholesky_solve(pull, root).squeeze(2), root


def one_law(conditional: bool) -> None:
    """Raise if a density is conditional: a generator is given nothing."""
    if conditional:
        raise ValueError(
            "a conditional density is another one at every row, and the generator learns to draw from one; use "
            "ContrastiveDivergence, ShortRun or ConditionalNoiseContrastive"
        )


def truncated(log_weight: Tensor, greatest: float) -> Tensor:
    """Weights `[n]` of sum 1, the largest of them cut to a level at which none is above so many times the mean.

    The level is one of the weights, the highest that will do; so at least n / `greatest` draws count, however far apart weights
    are. (To cut first and scale after would leave one draw that stands out as it was.)

    >>> truncated(torch.tensor([0.0, 0.0, 0.0, 100.0]), 2.0)
    tensor([0.2500, 0.2500, 0.2500, 0.2500])
    >>> truncated(torch.tensor([0.0, 0.0, 0.0, 1.0]).log1p(), 2.0)
    tensor([0.2000, 0.2000, 0.2000, 0.4000])
    """
    n = len(log_weight)
    log = log_weight.nan_to_num(nan=-torch.inf)
    log = (log - log.amax()).clamp(min=-_NOTHING)
    levels = log.sort().values
    above = torch.arange(n - 1, -1, -1, dtype=log.dtype, device=log.device)
    total = torch.logaddexp(
        levels.logcumsumexp(0), levels + above.log()
    )  # were all weights above cut to this one
    allowed = levels - total <= math.log(greatest / n) + 1e-5
    return log.clamp(max=torch.where(allowed, levels, -_NOTHING).amax()).softmax(0)


def _apart(a: Tensor, b: Tensor) -> Tensor:
    """Squared distances `[n, m]` of rows, without cancellation."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").square()


def _log(count: int) -> float:
    return math.log(count) if count else -math.inf
