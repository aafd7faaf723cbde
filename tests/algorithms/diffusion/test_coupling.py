"""Laws of coupling: an optimal assignment, marginals as they were, noise independent of conditions."""

import itertools

import pytest
import torch

from pgen.algorithms.diffusion.coupling import assignment, coupled


def total(cost, order):
    return float(cost[torch.arange(len(cost)), order].sum())


@pytest.mark.parametrize("n", [1, 2, 3, 5, 6])
@pytest.mark.parametrize("ties", [False, True])
def test_no_permutation_costs_less(n, ties):
    orders = [torch.tensor(p) for p in itertools.permutations(range(n))]
    for _ in range(20):
        cost = torch.randint(0, 3, (n, n)).double() if ties else torch.randn(n, n, dtype=torch.float64)
        found = assignment(cost)
        assert sorted(found.tolist()) == list(range(n))
        assert total(cost, found) <= min(total(cost, each) for each in orders) + 1e-9


@pytest.mark.parametrize("spread", [0.01, 1.0, 100.0])
def test_on_a_line_the_optimum_is_sorting(spread):
    x, y = spread * torch.randn(300, dtype=torch.float64), torch.randn(300, dtype=torch.float64)
    found = y[assignment((x[:, None] - y) ** 2)]
    torch.testing.assert_close(found[x.argsort()], y.sort().values)


def test_a_hidden_permutation_is_found():
    x, order = torch.randn(200, 5), torch.randperm(200)
    torch.testing.assert_close(coupled(x, x[order]), x)


def test_clusters_do_not_slow_it_down_to_a_halt():
    """Many equal rows: all paths cost the same."""
    x = torch.randn(4, 2).repeat(64, 1)
    found = coupled(x, torch.randn(256, 2))
    assert found.shape == (256, 2)


@pytest.mark.parametrize("event", [(), (2,), (1, 3, 3)])
def test_noise_is_only_rearranged_and_comes_nearer(event):
    x, noise = torch.randn(64, *event), torch.randn(64, *event)
    found = coupled(x, noise)
    flat = lambda v: v.reshape(64, -1)  # noqa: E731
    assert sorted(flat(found).tolist()) == sorted(flat(noise).tolist())
    assert (found - x).square().sum() < (noise - x).square().sum()


def test_classes_are_coupled_each_for_itself():
    label = torch.randint(3, (120,))
    x = torch.randn(120, 2) + label[:, None]
    noise = torch.randn(120, 2)
    found = coupled(x, noise, context=torch.nn.functional.one_hot(label, 3).float())
    for each in range(3):
        mine = label == each
        assert sorted(found[mine].tolist()) == sorted(noise[mine].tolist())
    free = coupled(x, noise)  # else noise tells the class, which fresh noise would not
    assert sorted(free[label == 0].tolist()) != sorted(noise[label == 0].tolist())


def test_rows_without_a_condition_are_coupled_among_themselves():
    context = torch.where(torch.arange(40)[:, None] < 20, torch.nan, torch.zeros(40, 2))
    x, noise = torch.randn(40, 2), torch.randn(40, 2)
    found = coupled(x, noise, context=context)
    assert sorted(found[:20].tolist()) == sorted(noise[:20].tolist())


def test_costs_that_are_none_are_refused():
    with pytest.raises(ValueError, match="square matrix of finite numbers"):
        assignment(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="square matrix of finite numbers"):
        assignment(torch.tensor([[float("nan")]]))
