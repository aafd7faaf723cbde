"""Bounds on the log evidence from importance weights, as pure functions of tensors.

A *log weight* is `log p(x, z) - log q(z | x)` at one draw `z` of the guide. Weights have the particles first
and any rows after: `[K, *rows]`. Every function returns a `Bound`: its `value` per row, in nats, detached,
and a scalar `loss`, minus the bound summed over rows, whose *gradient* is the estimator that the paper
prescribes (its value need not be the bound: reweighted wake-sleep has none, the doubly reparameterised
gradient has another integrand).

None of them reads a number out of a tensor, so each can be recorded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Bound(NamedTuple):
    """A bound (`value`, nats, `[*rows]`, detached) and the scalar `loss` to descend, summed over rows."""

    value: Tensor
    loss: Tensor


def elbo(log_weights: Tensor) -> Bound:
    r"""The evidence lower bound, `E_q[log w]`, averaged over particles.

    Args:
        log_weights: `[K, *rows]`, differentiable through reparameterised draws.

    Example:
        >>> elbo(torch.tensor([[0.0, 1.0], [2.0, 3.0]])).value
        tensor([1., 2.])

    References:
        Auto-Encoding Variational Bayes (Kingma & Welling, 2014), arXiv:1312.6114.
    """
    value = log_weights.mean(0)
    return Bound(value.detach(), -value.sum())


def beta_elbo(log_likelihood: Tensor, kl: Tensor, beta: float | Tensor = 1.0) -> Bound:
    r"""The ELBO from its two halves; `beta` weighs the divergence in the loss, never in the reported value.

    Args:
        log_likelihood: `E_q[log p(x | z)]`, `[*rows]`.
        kl: `KL(q(z | x) || p(z))`, `[*rows]`.
        beta: weight of the divergence in the loss; `1` descends minus the ELBO itself.

    References:
        beta-VAE (Higgins et al., ICLR 2017).
    """
    return Bound((log_likelihood - kl).detach(), -(log_likelihood - beta * kl).sum())


def iwae(log_weights: Tensor) -> Bound:
    r"""The importance-weighted bound `E[log 1/K sum_k w_k]`, which rises with `K` towards `log p(x)`.

    Args:
        log_weights: `[K, *rows]`, differentiable through reparameterised draws.

    Example:
        >>> iwae(torch.tensor([1.0, 3.0]).log()).value.exp()
        tensor(2.)

    References:
        Importance Weighted Autoencoders (Burda, Grosse & Salakhutdinov, ICLR 2016), arXiv:1509.00519.
    """
    value = log_mean_exp(log_weights)
    return Bound(value.detach(), -value.sum())


def renyi(log_weights: Tensor, alpha: float) -> Bound:
    r"""The variational Renyi bound, `1 / (1 - alpha) log 1/K sum_k w_k^(1 - alpha)`.

    `alpha = 1` is the ELBO, `alpha = 0` the importance-weighted bound, `alpha = -inf` the largest weight. It
    falls as alpha rises; below 0 it is no lower bound on the evidence any more.

    Args:
        log_weights: `[K, *rows]`, differentiable through reparameterised draws.
        alpha: order of the divergence, any number or `-math.inf`.

    References:
        Renyi Divergence Variational Inference (Li & Turner, NeurIPS 2016), arXiv:1602.02311.
    """
    value = power_mean(log_weights, 1 - alpha)
    return Bound(value.detach(), -value.sum())


def dreg(log_weights: Callable[[Sequence[Tensor]], Tensor], draws: Sequence[Tensor]) -> Bound:
    r"""The importance-weighted bound with the doubly reparameterised gradient of the guide.

    The gradient of the program is the usual `sum_k w_k grad log w_k`; that of the guide is
    `sum_k w_k^2 dlog w_k/dz_k dz_k/dphi`, free of the score term whose signal fades as `K` grows (`w_k`
    normalised).

    Args:
        log_weights: from draws to `[K, *rows]`. The guide's own tensors must enter only through the draws:
            evaluate `log q` with the guide's parameters detached, and from the given draws, not from the
            originals.
        draws: the guide's reparameterised draws, each `[K, *rows, ...]`.

    References:
        Doubly Reparameterized Gradient Estimators for Monte Carlo Objectives (Tucker, Lawson, Gu & Maddison,
        ICLR 2019), arXiv:1810.04152.
    """
    shares: list[Tensor] = []  # known only once the weights are; read in the backward pass
    copies = [scaled_path(draw, lambda draw=draw: _spread(shares[0], draw)) for draw in draws]
    log_w = log_weights(copies)
    shares.append(log_w.softmax(0).detach())
    return Bound(log_mean_exp(log_w).detach(), -(shares[0] * log_w).sum())


def scaled_path(draw: Tensor, factor: Callable[[], Tensor]) -> Tensor:
    """A copy of `draw` whose gradient is multiplied by `factor()` on its way back to `draw`.

    The factor is asked for in the backward pass, so it may depend on what is computed from the copy. It must
    broadcast against `draw`. This is all that the doubly reparameterised gradient needs of autograd.
    """
    copy = draw.view_as(draw)
    if copy.requires_grad:
        copy.register_hook(lambda gradient: gradient * factor().to(gradient.dtype))
    return copy


def wake_theta(log_joint: Tensor, log_guide: Tensor) -> Bound:
    r"""The program's half of reweighted wake-sleep: `sum_k w_k grad log p(x, z_k)`, `w_k` normalised.

    Args:
        log_joint: `log p(x, z_k)`, `[K, *rows]`.
        log_guide: `log q(z_k | x)`, `[K, *rows]`; no gradient flows into it.

    References:
        Reweighted Wake-Sleep (Bornschein & Bengio, ICLR 2015), arXiv:1406.2751.
    """
    log_w = (log_joint - log_guide).detach()
    return Bound(log_mean_exp(log_w), -(log_w.softmax(0) * log_joint).sum())


def wake_phi(log_joint: Tensor, log_guide: Tensor) -> Bound:
    r"""The guide's wake half: `sum_k w_k grad log q(z_k | x)`, a step against `KL(p(z | x) || q(z | x))`.

    Args:
        log_joint: `log p(x, z_k)`, `[K, *rows]`; no gradient flows into it.
        log_guide: `log q(z_k | x)`, `[K, *rows]`, at draws that carry no gradient (`z.detach()`).

    References:
        Reweighted Wake-Sleep (Bornschein & Bengio, ICLR 2015), arXiv:1406.2751.
    """
    log_w = (log_joint - log_guide).detach()
    return Bound(log_mean_exp(log_w), -(log_w.softmax(0) * log_guide).sum())


def sleep_phi(log_guide: Tensor) -> Bound:
    r"""The guide's sleep half, `grad log q(z | x)` at simulations `(z, x)` of the program.

    It is also the loss of neural posterior estimation. The value is minus a cross-entropy, not a bound on
    evidence.

    Args:
        log_guide: `log q(z | x)` at simulations, `[K, *rows]`.

    References:
        The wake-sleep algorithm (Hinton, Dayan, Frey & Neal, Science 1995).
    """
    return elbo(log_guide)


def free_bits(kl: Tensor, floor: float) -> Tensor:
    r"""`sum_j max(floor, KL_j)`: groups of latents that carry less than `floor` nats are not pressed further.

    Args:
        kl: expected divergence of each group (a site, or one of its dimensions), averaged over the batch,
            `[groups]`.
        floor: nats that each group may carry for free.

    Example:
        >>> free_bits(torch.tensor([0.1, 2.0]), floor=0.5)
        tensor(2.5000)

    References:
        Improved Variational Inference with Inverse Autoregressive Flow (Kingma et al., NeurIPS 2016),
        appendix C.8, arXiv:1606.04934.
    """
    return kl.clamp(min=floor).sum()


def warmup(index: int | Tensor, steps: int, fraction: float) -> float | Tensor:
    """Weight of the divergence at step `index` (a tensor gives one): rises linearly to 1 over the first `fraction` of `steps`.

    Example:
        >>> [warmup(i, steps=8, fraction=0.5) for i in (0, 1, 3, 7)]
        [0.25, 0.5, 1.0, 1.0]

    References:
        Ladder Variational Autoencoders (Sonderby et al., NeurIPS 2016), section 2.3, arXiv:1602.02282.
    """
    length = fraction * steps
    if length <= 1:
        return 1.0
    risen = (index + 1) / length
    return risen.clamp(max=1.0) if isinstance(risen, Tensor) else min(1.0, risen)


class Evidence(NamedTuple):
    """An importance-weighted estimate of the log evidence and its standard error, nats, `[*rows]`."""

    value: Tensor
    stderr: Tensor


def log_evidence(log_weights: Tensor) -> Evidence:
    r"""`log 1/K sum_k w_k` with its standard error by the delta method.

    The error is `sqrt(Var(w) / K) / E[w]`. It means nothing where the weights have no variance: look at
    k-hat.

    Args:
        log_weights: `[K, *rows]`, `K >= 2`.

    Example:
        >>> log_evidence(torch.zeros(5, 1))
        Evidence(value=tensor([0.]), stderr=tensor([0.]))
    """
    particles = log_weights.shape[0]
    excess = log_weights.softmax(0) - 1 / particles  # of each share over an equal one
    return Evidence(log_mean_exp(log_weights), (excess.square().sum(0) * particles / (particles - 1)).sqrt())


def log_mean_exp(log_weights: Tensor) -> Tensor:
    """`log 1/K sum_k exp(log_weights_k)` over the leading dimension."""
    return log_weights.logsumexp(0) - math.log(log_weights.shape[0])


def power_mean(log_weights: Tensor, power: float) -> Tensor:
    """`1/power log 1/K sum_k w_k^power` over the leading dimension, limits at 0 and infinity included."""
    if power == 0:
        return log_weights.mean(0)
    if math.isinf(power):
        return log_weights.amax(0) if power > 0 else log_weights.amin(0)
    if abs(power) > 0.1:
        return log_mean_exp(power * log_weights) / power
    # Near the geometric mean the logarithm of a number close to 1 is divided by one close to 0: keep the
    # digits. The mean equals its shift, so that the gradient through the centre cancels exactly.
    centre = log_weights.detach().mean(0)
    scaled = power * (log_weights - centre)
    near = scaled.abs().amax(0) < 1
    fine = torch.where(near, scaled, 0).expm1().mean(0).log1p()
    return centre + torch.where(near, fine, log_mean_exp(scaled)) / power


def _spread(weights: Tensor, like: Tensor) -> Tensor:
    """Weights `[K, *rows]` with dimensions appended, to broadcast against `like` `[K, *rows, ...]`."""
    return weights.reshape(weights.shape + (1,) * (like.dim() - weights.dim()))
