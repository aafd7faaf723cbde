"""One thread for small tensors, all of them for large ones, and as before afterwards."""

import torch
from torch import nn

from pgen.threads import SHARED, Work, threads_restored, use_threads


def cost(run):
    with Work() as work:
        run()
    return work.largest


def test_products_cost_their_multiply_adds():
    a, b = torch.ones(30, 40), torch.ones(40, 50)
    assert cost(lambda: a @ b) == 30 * 40 * 50
    assert cost(lambda: torch.bmm(a.expand(2, 30, 40), b.expand(2, 40, 50))) == 2 * 30 * 40 * 50
    assert cost(lambda: nn.Linear(40, 50)(a)) >= 30 * 40 * 50


def test_convolutions_cost_their_multiply_adds():
    layer, x = nn.Conv2d(3, 8, 5, padding=2), torch.ones(2, 3, 16, 16)
    assert cost(lambda: layer(x)) == 2 * 8 * 16 * 16 * 3 * 5 * 5


def test_factors_cost_cubes():
    assert cost(lambda: torch.linalg.cholesky(torch.eye(300))) >= 300**3


def test_elements_cost_more_than_multiply_adds():
    """Memory is slower than arithmetic: a sum of a million elements is worth sharing, a product of as many is not."""
    million = torch.ones(2**20)
    with Work() as work:
        million.sum()
    assert work.largest == SHARED
    assert work.threads(8) == 8
    with Work() as work:
        torch.ones(100, 100) @ torch.ones(100, 100)
    assert work.threads(8) == 1


def test_backward_passes_are_looked_at_too():
    x = torch.ones(64, 64, requires_grad=True)
    with Work() as work:
        torch.autograd.grad((x @ x).sum(), x)
    assert work.largest == 64**3


def test_threads_are_restored():
    before = torch.get_num_threads()
    with threads_restored() as found:
        use_threads(before + 1)
        assert found == before
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
