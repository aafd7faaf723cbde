"""Pareto-smoothed importance sampling against ratios whose tail is known in closed form."""

import math

import pytest
import torch

from pgen.algorithms import psis


def exponential_ratios(khat, draws, rows=1, seed=0):
    """Log ratios whose tail has exactly the shape `khat`.

    The proposal is Exp(1), the target Exp(1 - k): the ratio at x is proportional to exp(k x), so that
    P(ratio > t) = t^(-1 / k), a Pareto tail of shape k.
    """
    source = torch.Generator().manual_seed(seed)
    x = torch.empty(draws, rows, dtype=torch.float64).exponential_(generator=source)
    return khat * x + math.log(1 - khat) if khat < 1 else khat * x


@pytest.mark.parametrize("shape", [0.2, 0.5, 0.7, 0.9, 1.3])
def test_khat_is_the_shape_of_the_tail(shape):
    """The estimator's spread is about (1 + k) / sqrt(M), M = 3 sqrt(S); rows are averaged for its centre."""
    draws, rows = 10_000, 400
    found = psis.psis(exponential_ratios(shape, draws, rows)).khat
    spread = (1 + shape) / math.sqrt(psis.tail_length(draws))
    assert found.std() < 1.3 * spread
    # 5 standard errors of the mean (one in 1e6) beside the pull of the prior towards 0.5, which is 10 of M +
    # 10 draws
    assert abs(found.mean() - shape) < 5 * spread / math.sqrt(rows) + 0.05


def test_the_raw_fit_recovers_a_pareto_exactly_in_the_limit():
    middles = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    for shape in (-0.4, 0.1, 0.6, 1.5):
        truth = psis.Pareto(torch.tensor(shape, dtype=torch.float64), torch.tensor(2.0, dtype=torch.float64))
        found = psis.fit_pareto(truth.quantile(middles))
        assert abs(found.shape - shape) < 0.01
        assert abs(found.scale / 2.0 - 1) < 0.01


def test_the_quantile_inverts_the_distribution():
    p = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    for shape in (-0.5, 0.0, 0.8):
        x = psis.Pareto(
            torch.tensor(shape, dtype=torch.float64), torch.tensor(1.5, dtype=torch.float64)
        ).quantile(p)
        survival = torch.exp(-x / 1.5) if shape == 0 else (1 + shape * x / 1.5) ** (-1 / shape)
        torch.testing.assert_close(1 - survival, p)


def test_smoothing_lowers_the_error_of_the_normalising_constant():
    """At k = 0.7 the plain mean of ratios (truth: 1) has no variance; the smoothed one is closer."""
    ratios = exponential_ratios(0.7, draws=2_000, rows=2_000)
    plain = ratios.exp().mean(0)
    body = ratios.sort(0).values
    smoothed = psis.psis(ratios).log_weights.sort(0).values
    # the smallest ratio is never smoothed: it carries the scale from normalised weights back to ratios
    constant = (smoothed.logsumexp(0) + body[0] - smoothed[0]).exp() / len(ratios)
    assert (constant - 1).abs().mean() < 0.85 * (plain - 1).abs().mean()
    assert (constant - 1).square().mean() < 0.5 * (plain - 1).square().mean()


def test_only_the_tail_changes_and_order_is_kept():
    ratios = exponential_ratios(0.6, draws=400, rows=3)
    smoothed = psis.psis(ratios).log_weights
    length = psis.tail_length(400)
    order = ratios.argsort(0)
    assert (
        order == smoothed.argsort(dim=0, stable=True)
    ).float().mean() > 0.95  # equal weights may swap at the cap
    difference = (smoothed - ratios).gather(0, order)
    torch.testing.assert_close(difference[:-length], difference[:1].expand_as(difference[:-length]))
    assert difference[-length:].std() > 0
    assert (smoothed.amax(0) <= ratios.amax(0) + difference[0] + 1e-12).all()
    torch.testing.assert_close(smoothed.logsumexp(0), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-12)


def test_rows_are_smoothed_alone_and_constants_do_not_matter():
    ratios = torch.cat([exponential_ratios(k, 500, seed=i) for i, k in enumerate((0.1, 0.6, 1.1))], dim=1)
    together = psis.psis(ratios.reshape(500, 3, 1) + torch.tensor([0.0, 3000.0, -3000.0]).reshape(3, 1))
    assert together.khat.shape == (3, 1)
    for row in range(3):
        alone = psis.psis(ratios[:, row])
        torch.testing.assert_close(together.khat[row, 0], alone.khat)
        torch.testing.assert_close(together.log_weights[:, row, 0], alone.log_weights, rtol=0, atol=1e-9)


def test_equal_weights_have_no_tail_and_few_draws_tell_nothing():
    noise = 1e-7 * torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    level = psis.psis(torch.full((200, 4), -100.0) + noise)  # noise below single precision at this size
    assert (level.khat == -math.inf).all()
    torch.testing.assert_close(level.log_weights.exp(), torch.full((200, 4), 1 / 200))
    few = psis.psis(torch.randn(20, 4, generator=torch.Generator().manual_seed(0)))
    assert few.khat.isnan().all()
    torch.testing.assert_close(few.log_weights.exp().sum(0), torch.ones(4))


def test_ties_and_zero_weights_stay_finite():
    steps = torch.randn(200, 5, generator=torch.Generator().manual_seed(0)).round()
    assert torch.isfinite(psis.psis(steps).log_weights).all()
    gone = torch.where(torch.rand(200, 5, generator=torch.Generator().manual_seed(1)) < 0.5, -math.inf, steps)
    found = psis.psis(gone)
    assert not found.khat.isnan().any()
    torch.testing.assert_close(found.log_weights.exp().sum(0), torch.ones(5))


def test_a_bad_proposal_is_caught_and_a_good_one_is_not():
    """A proposal too narrow by half has ratios without a variance; one too wide has bounded ratios."""
    source = torch.Generator().manual_seed(0)
    z = torch.randn(4_000, 50, dtype=torch.float64, generator=source)
    target = torch.distributions.Normal(0.0, 1.0)
    for width, trusted in ((0.5, False), (1.5, True)):
        ratios = target.log_prob(width * z) - torch.distributions.Normal(0.0, width).log_prob(width * z)
        khat = psis.psis(ratios).khat
        assert ((khat < psis.khat_limit(4_000)).double().mean() > 0.9) == trusted


def test_effective_sample_size():
    assert psis.effective_sample_size(torch.zeros(8, 2)).tolist() == [8.0, 8.0]
    w = torch.randn(100, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(psis.effective_sample_size(w), w.exp().sum(0) ** 2 / (2 * w).exp().sum(0))
