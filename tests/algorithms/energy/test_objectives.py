"""What energies learn by: at the truth nothing changes on average, elsewhere it does, and in the right direction.

The family is f(x) = -a x^2 / 2 at data from N(0, 1): the truth is a = 1, and the likelihood's gradient is (1/a - m) / 2.
"""

import math

import pytest
import torch
from torch.distributions import constraints

from pgen.algorithms.energy.amortised import Amortised
from pgen.algorithms.energy.contrastive import (
    ContrastiveDivergence,
    PersistentContrastiveDivergence,
    ShortRun,
    leap,
)
from pgen.algorithms.energy.cooperative import Cooperative
from pgen.algorithms.energy.discrepancy import ConditionalNoiseContrastive, EnergyDiscrepancy
from pgen.algorithms.energy.learning import beyond
from pgen.algorithms.energy.likelihoods import PseudoLikelihood, RatioMatching
from pgen.algorithms.energy.matching import DenoisingScoreMatching, ScoreMatching, SlicedScoreMatching
from pgen.algorithms.energy.noise_contrastive import NoiseContrastive
from pgen.algorithms.energy.reference import Reference
from pgen.algorithms.energy.space import Space
from pgen.testing.statistics import StatisticalFailure, assert_frequencies, assert_mean

LINE = Space.of(constraints.real, (1,))
REPEATS, ROWS = 300, 128
CONSISTENT = {
    "cd": ContrastiveDivergence(steps=3, regularisation=0.0),
    "pcd": PersistentContrastiveDivergence(steps=3, chains=ROWS, regularisation=0.0),
    "short run": ShortRun(steps=20, leaps=32, regularisation=0.0),
    "nce": NoiseContrastive(),
    "cnce": ConditionalNoiseContrastive(),
    "amortised": Amortised(regularisation=0.0, hidden=(8,)),
    "cooperative": Cooperative(steps=3, regularisation=0.0, hidden=(8,)),
}


def gradients(objective, a, repeats=REPEATS):
    """Of the mean surrogate by a, at fresh data each."""
    torch.manual_seed(0)
    found = []
    for _ in range(repeats):
        x = torch.randn(ROWS, 1)
        memory = objective.memory(x, LINE)
        if hasattr(memory, "log_partition"):
            memory.log_partition.data.fill_(math.log(2 * math.pi / a) / 2)
        free = torch.tensor(a, requires_grad=True)
        surrogate = objective(lambda x, free=free: -free * x.square().sum(-1) / 2, x, memory).surrogate
        assert surrogate.shape == (ROWS,)
        found.append(torch.autograd.grad(surrogate.mean(), free)[0])
    return torch.stack(found)


@pytest.mark.parametrize("name", CONSISTENT)
def test_nothing_changes_at_the_truth(name):
    assert_mean(gradients(CONSISTENT[name], 1.0), 0.0)


@pytest.mark.parametrize("name", CONSISTENT)
def test_elsewhere_it_points_to_the_truth(name):
    for a, sign in ((0.5, 1), (2.0, -1)):
        found = gradients(CONSISTENT[name], a, 100)
        with pytest.raises(StatisticalFailure):
            assert_mean(found, 0.0)
        assert sign * float(found.mean()) > 0


def test_contrastive_divergence_has_the_gradient_of_the_likelihood_where_chains_mix():
    found = gradients(ContrastiveDivergence(steps=20, leaps=16, regularisation=0.0), 2.0)
    assert_mean(found, (1 / 2 - 1) / 2)


def test_score_matching_is_its_closed_form():
    x = torch.randn(200, 1, generator=torch.Generator().manual_seed(1))
    memory = ScoreMatching().memory(x, LINE)
    found = ScoreMatching()(lambda x: -1.7 * x.square().sum(-1) / 2, x, memory).surrogate.detach()
    m, s = x.mean(), x.std()
    u = (x[:, 0] - m) / s  # in whose units the score is -1.7 s (m + s u)
    torch.testing.assert_close(found, 1.7 * s**2 - (1.7 * s * (m + s * u)).square() / 2, rtol=1e-4, atol=1e-4)


def test_slices_have_the_exact_trace_as_their_mean():
    plane = Space.of(constraints.real, (2,))
    torch.manual_seed(2)
    x = torch.randn(8, 2)
    f = lambda x: -(x[:, 0] * x[:, 1]).square() - x.pow(4).sum(-1)  # noqa: E731
    exact = ScoreMatching(noise=0.0)
    sliced = SlicedScoreMatching(noise=1e-4, share=0.0, slices=4000)
    memory = exact.memory(x, plane)
    memory.calls.fill_(1e6)
    a, b = (way(f, x, memory).surrogate.detach() for way in (exact, sliced))
    torch.testing.assert_close(a, b, rtol=0.1, atol=0.5)


@pytest.mark.parametrize(
    "objective", [DenoisingScoreMatching(noise=0.2, share=0.0), SlicedScoreMatching(), EnergyDiscrepancy()]
)
def test_the_others_are_best_near_the_truth(objective):
    torch.manual_seed(3)
    x = torch.randn(20_000, 1)
    memory, values = objective.memory(x, LINE), {}
    if hasattr(memory, "calls"):
        memory.calls.fill_(1e6)  # the noise has become narrow
    for a in (0.5, 1.0, 2.0):
        torch.manual_seed(4)
        surrogate = objective(lambda x, a=a: -a * x.square().sum(-1) / 2, x, memory).surrogate
        values[a] = float(surrogate.detach().mean())
    assert values[1.0] > max(values[0.5], values[2.0])


def test_pseudo_likelihood_of_independent_bits_is_the_likelihood():
    x = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    logits = torch.tensor([0.3, -2.0])
    space = Space.of(constraints.boolean, (2,))
    found = PseudoLikelihood()(lambda x: x @ logits, x, PseudoLikelihood().memory(x, space)).surrogate
    expected = torch.distributions.Bernoulli(logits=logits).log_prob(x).sum(-1)
    torch.testing.assert_close(found, expected)
    ratio = RatioMatching()(lambda x: x @ logits, x, RatioMatching().memory(x, space)).surrogate
    assert ratio.shape == (2,)


def test_leaps_keep_the_density_and_join_modes():
    torch.manual_seed(5)
    f = lambda x: torch.logaddexp(-8 * (x[:, 0] - 2).square(), -8 * (x[:, 0] + 2).square() + math.log(3.0))  # noqa: E731
    chains = torch.full((20_000, 1), 2.0)
    reference = Reference(torch.randn(500, 1) * 2, LINE)
    for _ in range(40):
        chains, _ = leap(chains, f, reference, 16)
    assert_frequencies((chains[:, 0] > 0).long(), torch.tensor([0.75, 0.25]))


def test_persistent_chains_stay_and_age():
    method = PersistentContrastiveDivergence(chains=50, renew=0.0)
    x = torch.randn(20, 1)
    memory = method.memory(x, LINE)
    before = memory.position.clone()
    method(lambda x: -x.square().sum(-1) / 2, x, memory)
    assert int((memory.age > 0).sum()) == 20
    assert bool((memory.position[memory.age == 0] == before[memory.age == 0]).all())
    with pytest.raises(ValueError, match="conditional"):
        method.memory(x, LINE, conditional=True)


def test_what_leaves_for_good_is_told_as_no_number():
    assert beyond(torch.tensor(0.5)) == 0.5
    assert not bool(beyond(torch.tensor(1.5)).isfinite())
    x = torch.randn(64, 1)
    method = PersistentContrastiveDivergence(steps=100, leaps=0, renew=0.0, chains=64)
    memory, told = method.memory(x, LINE), {}
    for _ in range(20):
        told = method(lambda x: 50 * x.square().sum(-1), x, memory).told
    assert not bool(told["escaped"].isfinite())


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: ContrastiveDivergence(steps=0), "steps"),
        (lambda: PersistentContrastiveDivergence(renew=2.0), "renew"),
        (lambda: NoiseContrastive(ratio=0), "ratio"),
        (lambda: DenoisingScoreMatching(noise=-1.0), "noise"),
    ],
)
def test_wrong_hyperparameters_are_named(make, told):
    with pytest.raises(ValueError, match=told):
        make()
