"""What the tests of training train."""

import torch

from pgen.problem import Problem
from pgen.run import Player


def program(x):
    return x


def problem(rows=300, seed=1):
    x = torch.randn(rows, 2, generator=torch.Generator().manual_seed(seed))
    return Problem.of(program, {"x": x})


def mean_player(start=0.0, noise=0.0, dtype=None):
    """Minimises (loc - x)^2 on average: the answer is the mean of the data."""
    loc = torch.full((2,), start, dtype=dtype).requires_grad_()

    def loss(batch, step):
        error = (loc - batch.inputs["x"]).square().sum(-1).mean()
        return error + noise * (torch.randn(2) * loc).sum(), {"first": loc[0], "rows": float(batch.rows)}

    return Player({"loc": loc}, loss)


def trained(player):
    return [tensor.detach().clone() for tensor in player.parameters.values()]


def same(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))
