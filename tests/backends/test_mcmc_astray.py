"""Chains that warmed up in a place of hardly any mass begin anew; modes that count are left alone."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pgen
from pgen.backends.mcmc import samplers
from pgen.backends.mcmc.astray import hopeless

CHAINS, DRAWS = 32, 30


def draws_of(*places: Tensor) -> Tensor:
    """Draws `[n, C, d]` of chains that are each in one place: covariances of as many groups, in turn."""
    torch.manual_seed(0)
    share = CHAINS // len(places)
    groups = [torch.randn(DRAWS, share, len(p), dtype=torch.float64) @ p.mT for p in places]
    return torch.cat([group + 100 * i for i, group in enumerate(groups)], 1)


def target_of(*modes: tuple[float, Tensor]):
    """The log density of separate normal modes, each of a log mass and a scale `[d, d]`, and no gradient."""

    def target(q: Tensor) -> tuple[Tensor, Tensor]:
        laws = [
            mass
            + dist.MultivariateNormal(torch.full((len(s),), 100.0 * i, dtype=q.dtype), scale_tril=s).log_prob(
                q
            )
            for i, (mass, s) in enumerate(modes)
        ]
        return torch.stack(laws).logsumexp(0), q

    return target


ROUND = torch.eye(4, dtype=torch.float64)
NARROW = torch.linalg.cholesky(
    0.001 * torch.eye(4, dtype=torch.float64) + 0.999
)  # log volume is 9.7 nats below


@pytest.mark.parametrize(
    ("lower", "moved"), [(0.0, 0), (-2.0, 0), (-4.0, 0), (-9.0, CHAINS // 2), (-30.0, CHAINS // 2)]
)
def test_half_of_the_chains_in_a_lesser_mode(lower, moved):
    found = hopeless(target_of((0.0, ROUND), (lower, 2 * ROUND)), draws_of(ROUND, 2 * ROUND))
    assert int(found.sum()) == moved
    assert not found[: CHAINS // 2].any()


@pytest.mark.parametrize(("mass", "moved"), [(0.0, False), (-9.0, True)])
def test_correlation_counts_in_the_volume(mass, moved):
    """Without it the narrow mode's volume would be 9.7 nats too large, and its mass with it."""
    found = hopeless(target_of((mass, NARROW), (0.0, ROUND)), draws_of(NARROW, ROUND))
    assert bool(found[: CHAINS // 2].all()) == moved
    assert not found[CHAINS // 2 :].any()


def test_a_funnel_has_no_lost_chains():
    torch.manual_seed(1)
    v = 3 * torch.randn(1, CHAINS, 1, dtype=torch.float64) + 0.5 * torch.randn(
        DRAWS, CHAINS, 1, dtype=torch.float64
    )
    q = torch.cat([v, (v / 2).exp() * torch.randn(DRAWS, CHAINS, 9, dtype=torch.float64)], -1)

    def target(q: Tensor) -> tuple[Tensor, Tensor]:
        v, x = q[:, 0], q[:, 1:]
        return dist.Normal(0.0, 3.0).log_prob(v) + dist.Normal(0.0, (v / 2).exp()[:, None]).log_prob(x).sum(
            -1
        ), q

    assert not hopeless(target, q).any()


def two_modes() -> None:
    """Modes at -10 and 10, the second of weight 1e-5."""
    weights = torch.tensor([1 - 1e-5, 1e-5])
    modes = dist.Normal(torch.tensor([-10.0, 10.0]), 1.0)
    pyro.sample("x", dist.MixtureSameFamily(dist.Categorical(weights), modes))


def in_the_lesser_mode(fitted) -> float:
    return float((fitted.draws()["x"] > 0).double().mean())


def starts() -> dict[str, Tensor]:
    """Half of the chains begin in each mode."""
    return {"x": torch.tensor([-10.0, 10.0]).repeat(CHAINS // 2)}


def test_no_draws_in_a_mode_of_no_weight(monkeypatch):
    method = pgen.backend("mcmc", chains=CHAINS, warmup=100, draws=100, init=starts())
    fitted = pgen.fit(two_modes, None, method)
    assert in_the_lesser_mode(fitted) == 0
    assert any(
        f" of {CHAINS} chains had warmed up in a place of hardly any mass" in text
        for text in fitted.history.warnings
    )
    assert math.isclose(float(fitted.draws()["x"].mean()), -10, abs_tol=0.2)
    monkeypatch.setattr(samplers, "hopeless", lambda _, q: torch.zeros(q.shape[1], dtype=torch.bool))
    assert in_the_lesser_mode(pgen.fit(two_modes, None, method)) > 0.4
