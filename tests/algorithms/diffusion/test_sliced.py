"""Laws of sliced score matching: Hyvarinen's loss on average, the same minimum as denoising score matching."""

import torch
from torch import nn

from pgen.algorithms.diffusion import losses
from pgen.algorithms.diffusion.mixture import Mixture
from pgen.algorithms.diffusion.sliced import sliced
from pgen.testing.statistics import assert_mean


def cubic(x):
    return torch.stack([x[:, 0] * x[:, 1], x[:, 1] ** 3 - x[:, 0]], 1)


def test_the_mean_over_directions_is_trace_and_half_square():
    n = 10_000  # notices a tenth of a standard deviation
    x = torch.tensor([[0.7, -1.2]]).expand(n, 2)
    exact = (-1.2 + 3 * 1.2**2) + float(cubic(x[:1]).square().sum()) / 2
    for directions in (torch.randn(n, 2), torch.randint(2, (n, 2)) * 2.0 - 1):
        assert_mean(sliced(cubic, x, directions), exact)
    basis = torch.eye(2)[:, None].expand(2, n, 2) * 2**0.5  # covariance I: no randomness left
    torch.testing.assert_close(sliced(cubic, x, basis), torch.full((n,), exact))


def test_its_mean_is_the_distance_to_the_score_up_to_a_constant():
    n = 40_000
    law = Mixture(torch.tensor([[-1.0], [1.5]]), scale=0.8)
    x = law.sample(n)
    true, signs = lambda x: law.score(x, 1e-4), torch.randint(2, (n, 1)) * 2.0 - 1
    true = lambda x: torch.func.grad(lambda x: law.log_prob(x).sum())(x)  # noqa: E731
    for other in (lambda x: -x, lambda x: true(x) + 0.3 * torch.sin(x), lambda x: torch.zeros_like(x)):
        excess = sliced(other, x, signs) - sliced(true, x, signs)
        distance = (other(x) - true(x)).square().sum(1) / 2
        assert_mean(excess - distance, 0.0)


def test_it_and_denoising_have_one_minimum():
    """Scores -theta x of noisy standard normal numbers: both are parabolas in theta, around 1 / (1 + sigma^2)."""
    n, sigma = 20_000, 0.7
    x, noise = torch.randn(2, n, 1, dtype=torch.float64)
    noisy = x + sigma * noise

    def slopes(theta):
        """Derivatives of both losses, row by row: of denoising, as a score's (its error over sigma^2)."""
        one, two = (torch.full((n, 1), theta, dtype=torch.float64, requires_grad=True) for _ in range(2))
        by_slices = sliced(lambda v: -one * v, noisy, torch.ones_like(noisy))
        denoised = losses.denoising(
            lambda v, s: v - s[:, None] ** 2 * two * v,
            x,
            torch.full((n,), sigma, dtype=torch.float64),
            noise,
            lambda s: 0.5 / s**4,
        )
        return (
            torch.autograd.grad(by_slices.sum(), one)[0],
            torch.autograd.grad(denoised.sum(), two)[0],
        )

    for slope in slopes(1 / (1 + sigma**2)):
        assert_mean(slope, 0.0)
    for slope in slopes(0.75):  # elsewhere they agree as well, and are not zero
        assert_mean(slope, 0.75 * (1 + sigma**2) - 1)
        assert abs(float(slope.mean())) > 0.05


def test_it_trains_networks_and_takes_any_event():
    net = nn.Sequential(nn.Flatten(), nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 6), nn.Unflatten(1, (2, 3)))
    x = torch.randn(5, 2, 3)
    loss = sliced(net, x, torch.randn(4, 5, 2, 3))
    assert loss.shape == (5,)
    loss.mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in list(net.parameters())[:-1])
