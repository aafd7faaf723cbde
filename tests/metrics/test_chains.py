"""R-hat, effective sample sizes and Monte Carlo errors: exact laws, and agreement with ArviZ."""

import time

import numpy as np
import pytest
import torch

from pgen.metrics import chains
from pgen.metrics.beta import beta_quantile

SHAPES = [
    (1, 4),
    (2, 5),
    (3, 7),
    (4, 9),
    (1, 100),
    (4, 250),
    (7, 513),
    (7, 514),
    (64, 50),
    (512, 20),
    (512, 21),
]


def autoregression(count, draws, rho, size=1, seed=0):
    """Stationary chains x_t = rho x_(t-1) + noise of variance one, `[count, draws, size]`."""
    noise = torch.randn(
        count, draws, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    x = [noise[:, 0]]
    for t in range(1, draws):
        x.append(rho * x[-1] + (1 - rho**2) ** 0.5 * noise[:, t])
    return torch.stack(x, 1)


def specimens(count, draws):
    """Coordinates of every kind: slow, alternating, with ties, heavy-tailed, drifting, of tiny scale, constant, NaN."""
    slow = autoregression(count, draws, 0.9, 3)
    ties = (3 * autoregression(count, draws, 0.5, 1, seed=1)).round()
    fast = autoregression(count, draws, -0.7, 1, seed=2)
    heavy = torch.tan(1.5 * torch.tanh(autoregression(count, draws, 0.3, 1, seed=3)))
    slow[..., 1] += torch.linspace(-2, 2, draws, dtype=torch.float64)
    tiny = 1e-8 * autoregression(count, draws, 0.2, 1, seed=4) + 1.0
    still = torch.full((count, draws, 1), 0.3, dtype=torch.float64)
    bad = fast.clone()
    bad[-1, 1] = torch.nan
    return torch.cat([slow, ties, fast, heavy, tiny, still, bad], -1)


# --- the same numbers as ArviZ ---


def arviz():
    return pytest.importorskip(
        "arviz_stats.base", reason="needs arviz-stats: pip install 'pgen-ppl[diagnostics]'"
    ).array_stats


THEIRS = {
    "r_hat": (chains.r_hat, lambda a, x: a._rhat_rank(x)),
    "ess_bulk": (chains.ess_bulk, lambda a, x: a._ess_bulk(x)),
    "ess_tail": (chains.ess_tail, lambda a, x: a._ess_tail(x, 0.05)),
    "ess_mean": (chains.ess_mean, lambda a, x: a._ess_mean(x)),
    "ess_quantile": (lambda x: chains.ess_quantile(x, 0.3), lambda a, x: a._ess_quantile(x, 0.3)),
    "mcse_mean": (chains.mcse_mean, lambda a, x: a._mcse_mean(x)),
    "mcse_median": (lambda x: chains.mcse_quantile(x, 0.5), lambda a, x: a._mcse_quantile(x, 0.5)),
    "mcse_quantile": (lambda x: chains.mcse_quantile(x, 0.9), lambda a, x: a._mcse_quantile(x, 0.9)),
}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", THEIRS)
def test_agrees_with_arviz(name, shape):
    if name == "r_hat" and shape[0] == 1:
        pytest.skip("ArviZ gives no R-hat of one chain")
    theirs = arviz()
    ours, reference = THEIRS[name]
    x = specimens(*shape)
    with np.errstate(all="ignore"):
        expected = [float(reference(theirs, x[..., k].numpy())) for k in range(x.shape[-1])]
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(ours(x), expected, rtol=1e-7, atol=1e-14, equal_nan=True)


def test_energies_agree_with_arviz():
    x = autoregression(5, 101, 0.8)[..., 0]
    torch.testing.assert_close(chains.e_bfmi(x), torch.from_numpy(arviz()._bfmi(x.numpy())))


def test_error_of_the_standard_deviation_uses_the_memory_of_squares():
    """As `arviz` 0.23 does; `arviz-stats` 0.8 takes the memory of the draws, too much by far for alternating ones."""
    x = autoregression(4, 500, -0.8)
    squares = (x - x.mean()).square()
    exact = (squares.var(correction=0) / chains.ess_mean(squares)).sqrt() / (2 * x.std(correction=0))
    torch.testing.assert_close(chains.mcse_sd(x), exact)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_one_pass_gives_what_each_function_gives(shape):
    x = specimens(*shape)
    found = chains.diagnose(x, (0.05, 0.3))
    for name in ("r_hat", "ess_bulk", "ess_tail", "mcse_mean"):
        torch.testing.assert_close(
            getattr(found, name), getattr(chains, name)(x), rtol=1e-12, atol=0.0, equal_nan=True
        )
    every = x.flatten(0, 1)
    torch.testing.assert_close(found.mean, every.mean(0), equal_nan=True)
    torch.testing.assert_close(found.sd, every.std(0), equal_nan=True, atol=1e-15, rtol=1e-9)
    expected = torch.from_numpy(np.quantile(every.numpy(), [0.05, 0.3], axis=0))
    torch.testing.assert_close(found.quantiles, expected, equal_nan=True)


# --- laws ---


@pytest.mark.parametrize("rho", [-0.3, 0.0, 0.5, 0.9])
@pytest.mark.parametrize(
    ("length", "bias"), [(200, 0.15), (2000, 0.05)]
)  # matrix products, Fourier transforms
def test_effective_draws_of_an_autoregression(rho, length, bias):
    """n (1 - rho) / (1 + rho), averaged over 64 coordinates; cutting at the first negative pair biases short chains."""
    x = autoregression(8, length, rho, 64)
    exact = 8 * length * (1 - rho) / (1 + rho)
    for found in (chains.ess_mean(x), chains.ess_bulk(x)):
        assert abs(float(found.mean()) / exact - 1) < bias + 5 * float(found.std()) / exact / 8


def test_independent_draws_count_fully():
    x = torch.randn(4, 1000, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = chains.diagnose(x)
    assert 0.9 < float((found.ess_bulk / 4000).mean()) < 1.1
    assert 0.85 < float((found.ess_tail / 4000).mean()) < 1.1
    assert float(found.r_hat.max()) < 1.01
    torch.testing.assert_close(found.mcse_mean, torch.full_like(found.sd, 1 / 4000**0.5), rtol=0.2, atol=0.0)


def test_the_error_of_the_mean_is_what_repetition_shows():
    """400 repetitions: the standard deviation of means is known to 3.5 %, five times which is allowed."""
    x = autoregression(4 * 400, 200, 0.7).reshape(400, 4, 200).permute(1, 2, 0)
    shown = float(x.mean((0, 1)).std())
    assert abs(float(chains.mcse_mean(x).mean()) / shown - 1) < 0.2
    shown = float(torch.quantile(x.flatten(0, 1), 0.9, dim=0).std())
    assert abs(float(chains.mcse_quantile(x, 0.9).mean()) / shown - 1) < 0.25
    shown = float(x.flatten(0, 1).std(0).std())
    assert abs(float(chains.mcse_sd(x).mean()) / shown - 1) < 0.25


def test_r_hat_of_shifted_chains():
    """Two groups of two half-chains at distance delta: R^2 = (n-1)/n + (delta^2 / 3) / W, whatever the noise."""
    x = torch.randn(2, 400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    # Halves of mean 0 and variance 1 exactly, before the shift.
    halves = x.reshape(4, 200)
    halves = ((halves - halves.mean(1, keepdim=True)) / halves.std(1, keepdim=True)).reshape(2, 400)
    for delta in (0.0, 0.5, 2.0):
        shifted = halves + torch.tensor([0.0, delta], dtype=torch.float64)[:, None]
        exact = (199 / 200 + delta**2 / 3) ** 0.5
        found = chains._r_hat(chains._split(shifted[None]))
        torch.testing.assert_close(found, torch.tensor([exact], dtype=torch.float64))


def test_r_hat_sees_what_differs():
    base = autoregression(4, 500, 0.0)[..., 0]
    where, spread, drift = base.clone(), base.clone(), base.clone()
    where[0] += 1.0
    spread[0] *= 3.0
    drift += torch.linspace(0, 2, 500, dtype=torch.float64)
    one = drift[:1]
    assert float(chains.r_hat(base)) < 1.01
    assert all(float(chains.r_hat(x)) > 1.03 for x in (where, spread, drift, one))
    ranked = chains.Ranked.of(chains._split(spread[None])).normal(chains._scores(spread))
    assert float(chains._r_hat(ranked)) < 1.01  # without folding, scales are not seen


def test_only_ranks_matter():
    x = autoregression(4, 250, 0.5, 5)
    for name in ("ess_bulk", "r_hat", "ess_tail"):
        if name != "r_hat":  # folding knows distances
            torch.testing.assert_close(getattr(chains, name)(x), getattr(chains, name)(x.exp()))
        torch.testing.assert_close(
            getattr(chains, name)(x), getattr(chains, name)(-4 * x if name != "ess_tail" else 4 * x)
        )


def test_chains_that_never_move_apart():
    x = torch.zeros(2, 10, dtype=torch.float64)
    x[1] = 1.0
    assert float(chains.r_hat(x)) == np.inf
    assert np.isnan(float(chains.r_hat(torch.zeros(2, 10))))


@pytest.mark.parametrize("draws", [0, 1, 2, 3])
def test_too_few_draws_say_nothing(draws):
    x = torch.randn(3, draws, 2, dtype=torch.float64)
    found = chains.diagnose(x)
    assert all(bool(v.isnan().all()) for v in (found.r_hat, found.ess_bulk, found.ess_tail, found.mcse_mean))
    if draws:
        torch.testing.assert_close(found.mean, x.flatten(0, 1).mean(0))
    assert bool(chains.mcse_quantile(x, 0.5).isnan().all())


def test_any_shape_and_dtype():
    x = autoregression(4, 30, 0.2, 6)
    flat = chains.ess_bulk(x)
    assert torch.equal(chains.ess_bulk(x.reshape(4, 30, 2, 3)), flat.reshape(2, 3))
    assert chains.diagnose(x.reshape(4, 30, 2, 3), (0.1, 0.2, 0.3, 0.4)).quantiles.shape == (4, 2, 3)
    assert chains.ess_bulk(x[..., 0]).shape == ()
    assert chains.ess_bulk(x[..., :0]).shape == (0,)
    for kind in (torch.float32, torch.int64, torch.bool):
        assert chains.diagnose((3 * x).to(kind)).ess_bulk.dtype is torch.float64
    with pytest.raises(ValueError, match=r"shape \(5,\); expected \[chains, draws"):
        chains.r_hat(torch.zeros(5))


def test_energy_fraction():
    energy = torch.tensor([[0.0, 1.0, 0.0, 1.0], [0.0, 0.0, 1.0, 1.0], [2.0, 2.0, 2.0, 2.0]])
    expected = torch.tensor([3.0, 1.0, torch.nan], dtype=torch.float64)
    torch.testing.assert_close(chains.e_bfmi(energy), expected, equal_nan=True)


def test_autocorrelation():
    x = autoregression(3, 50, 0.5, 2)
    found = chains.autocorrelation(x)
    centred = x - x.mean(1, keepdim=True)
    lag = 7
    expected = (centred[:, lag:] * centred[:, :-lag]).sum(1) / centred.square().sum(1)
    torch.testing.assert_close(found[:, lag], expected)
    torch.testing.assert_close(found[:, 0], torch.ones(3, 2, dtype=torch.float64))


# --- chance ---


@pytest.mark.parametrize("shape", [(1, 1000), (4, 200), (16, 100), (512, 20)], ids=str)
@pytest.mark.parametrize("rho", [-0.6, 0.0, 0.5])
def test_chance_explains_the_r_hat_of_chains_that_agree(shape, rho):
    """At level 1e-3, over 400 coordinates; the approximation is held to ten times that."""
    found = chains.diagnose(autoregression(*shape, rho, 400))
    limit = chains.r_hat_by_chance(found.ess_half, shape[0], 1e-3)
    alarms = (found.r_hat > 1.01) & (found.r_hat > limit)
    assert float(alarms.double().mean()) <= 0.01


def test_chance_does_not_explain_chains_that_disagree():
    x = autoregression(4, 1000, 0.5, 20)
    x[0] += 0.5
    found = chains.diagnose(x)
    assert bool((found.r_hat > chains.r_hat_by_chance(found.ess_half, 4, 1e-3 / 20)).all())


def test_beta_quantiles():
    """Beta(a, 1) and Beta(1, b) have quantiles p^(1/a) and 1 - (1-p)^(1/b); order statistics are symmetric."""
    p = torch.tensor([0.01, 0.16, 0.5, 0.84, 0.99], dtype=torch.float64)
    one = torch.ones((), dtype=torch.float64)
    for a in (1.0, 2.5, 40.0, 1e4):
        torch.testing.assert_close(beta_quantile(p, a * one, one), p ** (1 / a), rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(
            beta_quantile(p, one, a * one), 1 - (1 - p) ** (1 / a), rtol=1e-7, atol=1e-9
        )
        left, right = beta_quantile(p, a * one, 3 * one), beta_quantile(1 - p, 3 * one, a * one)
        torch.testing.assert_close(left, 1 - right, rtol=1e-9, atol=1e-12)


def test_many_chains_are_judged_quickly():
    """512 chains x 200 draws x 30 coordinates: about 0.25 s on a busy core; the bound allows for a worse one."""
    x = torch.randn(512, 200, 30, dtype=torch.float64)
    times = []
    for _ in range(3):
        start = time.process_time()
        chains.diagnose(x)
        times.append(time.process_time() - start)
    assert min(times) < 1.5
