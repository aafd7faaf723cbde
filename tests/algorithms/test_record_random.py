"""Random functions, recorded, draw the same stream of numbers, anew in every call."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch import distributions as dist

from pgen.algorithms.record import NotRecorded, Recorded, Unrecordable, record
from tests.algorithms.record_laws import check

DRAWS = {
    "rand": lambda x: torch.rand(3) + torch.rand_like(x),
    "randn": lambda x: torch.randn(2, 3) * x + torch.randn_like(x),
    "randint": lambda x: torch.randint(0, 9, (3,)) + torch.randint_like(x, 5) + torch.randperm(3),
    "normal": lambda x: torch.normal(x, x.exp()) + torch.normal(0.0, 1.0, (3,)),
    "in place": lambda x: torch.empty(3).normal_() + torch.empty(3).uniform_(1, 2) * x.clone().exponential_(),
    "more in place": lambda x: (
        torch.zeros(3).geometric_(0.5) + torch.ones(3).log_normal_() + torch.zeros(3).cauchy_()
    ),
    "random_ in place": lambda x: torch.zeros(3).random_(5) + torch.zeros(3).bernoulli_(0.3) * x,
    "bernoulli": lambda x: torch.bernoulli(x.sigmoid()) + torch.empty(3).bernoulli_(x.sigmoid()),
    "dropout": lambda x: nn.functional.dropout(x, 0.5) + nn.functional.alpha_dropout(x, 0.5),
    "dropped features": lambda x: nn.functional.dropout2d(x.expand(2, 2, 2, 3), 0.5),
    "random relu": lambda x: nn.functional.rrelu(x, training=True),
    "multinomial": lambda x: torch.multinomial(x.exp(), 5, replacement=True) + torch.multinomial(x.exp(), 1),
    "gamma": lambda x: (
        torch._standard_gamma(x.exp()) + dist.Gamma(x.exp(), 2.0, validate_args=False).rsample()
    ),
    "beta and dirichlet": lambda x: (
        dist.Beta(x.exp(), x.exp(), False).rsample() + dist.Dirichlet(x.exp(), False).rsample()
    ),
    "poisson and binomial": lambda x: (
        torch.poisson(x.exp()) + torch.binomial(torch.full((3,), 9.0), x.sigmoid())
    ),
    "categorical": lambda x: dist.Categorical(logits=x, validate_args=False).sample((4,)),
    "unused": lambda x: (torch.rand(3), x)[1],
    "twice the same": lambda x: torch.rand(3) - torch.rand(3),
    "of constants": lambda x: torch.bernoulli(torch.full((3,), 0.5)),
    "attention": lambda x: nn.functional.scaled_dot_product_attention(
        *[x.expand(1, 2, 4, 3)] * 3, dropout_p=0.5
    ),
}


@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.parametrize("simplify", [True, False])
def test_the_same_stream(name: str, simplify: bool) -> None:
    fast = check(DRAWS[name], (torch.randn(3),), (torch.randn(3),), simplify=simplify)
    x = torch.randn(3)
    results = {str(fast(x)) for _ in range(40)}
    assert len(results) > 1 or name == "unused", "a draw became a constant"


def test_draws_under_vmap_and_in_gradients() -> None:
    def noisy(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        value = torch.vmap(lambda one: (one * torch.randn(3)).sum() + torch.rand(()), randomness="different")(
            x
        )
        same = torch.vmap(lambda one: one * torch.randn(3), randomness="same")(x)
        return torch.autograd.grad(value.sum() + same.sum(), x)[0]

    check(noisy, (torch.randn(4, 3),), (torch.randn(4, 3),))


def test_dropout_in_a_module_and_its_gradient() -> None:
    module = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.LSTM(8, 3, num_layers=2, dropout=0.3))

    def run(x: Tensor) -> list[Tensor]:
        value = module(x)[0]
        return [value, *torch.autograd.grad(value.square().sum(), list(module.parameters()))]

    check(run, (torch.randn(5, 2, 4),), (torch.randn(5, 2, 4),))


def test_a_generator_of_its_own_goes_on() -> None:
    def draws(fn) -> list[float]:
        generator = torch.Generator().manual_seed(3)
        return [float(fn(torch.ones(()), generator)) for _ in range(4)]

    def draw(x: Tensor, generator: torch.Generator) -> Tensor:
        return x * torch.rand((), generator=generator)

    expected = draws(draw)
    assert draws(Recorded(draw, fallback=False)) == expected
    assert len(set(expected)) == 4
    mine = torch.Generator().manual_seed(3)
    captured = Recorded(lambda x: x * torch.rand((), generator=mine), fallback=False)
    assert [float(captured(torch.ones(()))) for _ in range(4)] == expected


@pytest.mark.parametrize("seeding", ["seed inside", "python", "numpy"])
def test_dice_that_a_replay_cannot_throw(seeding: str) -> None:
    numpy = pytest.importorskip("numpy")

    def draw(x: Tensor) -> Tensor:
        if seeding == "seed inside":
            torch.manual_seed(1)
            return x * torch.rand(())
        return x * (random.random() if seeding == "python" else numpy.random.rand())

    fast = record(draw)
    with pytest.warns(NotRecorded):
        fast(torch.ones(()))
    found = {float(fast(torch.ones(()))) for _ in range(5)}
    assert len(found) == (1 if seeding == "seed inside" else 5)


def test_the_first_call_leaves_the_stream_where_the_function_would() -> None:
    torch.manual_seed(0)
    expected = [torch.randn(2), torch.randn(2), torch.rand(1)]
    torch.manual_seed(0)
    fast = record(lambda: torch.randn(2))
    found = [fast(), fast(), torch.rand(1)]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def _made_inside(x: Tensor, mine: torch.Generator) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return x + torch.rand((), generator=generator)


def _seeded_inside(x: Tensor, mine: torch.Generator) -> Tensor:
    mine.manual_seed(0)
    return x + torch.rand((), generator=mine)


def _seeded_between(x: Tensor, mine: torch.Generator) -> Tensor:
    x = x + torch.rand((), generator=mine)
    mine.manual_seed(0)
    return x + torch.rand((), generator=mine)


def _put_back(x: Tensor, mine: torch.Generator) -> Tensor:
    state = mine.get_state()
    x = x + torch.rand((), generator=mine)
    mine.set_state(state)
    return x + torch.rand((), generator=mine)


@pytest.mark.parametrize("fn", [_made_inside, _seeded_inside, _seeded_between, _put_back])
def test_a_generator_that_every_run_seeds_is_refused_with_the_line(fn: Callable[..., Tensor]) -> None:
    mine = torch.Generator().manual_seed(3)
    with pytest.raises(
        Unrecordable, match=r"made, or seeded, in every run at .*test_record_random.*torch\.rand"
    ):
        Recorded(lambda x: fn(x, mine), fallback=False)(torch.ones(()))


def test_a_second_look_at_a_generator_leaves_everything_as_it_was() -> None:
    mine, total = torch.Generator().manual_seed(3), torch.zeros(())

    def draw(x: Tensor) -> Tensor:
        total.add_(1.0)
        return x + total + torch.rand((), generator=mine) + torch.rand(())

    def numbers(fn: Callable[..., Tensor]) -> list[float]:
        mine.manual_seed(3)
        torch.manual_seed(4)
        total.zero_()
        return [float(fn(torch.ones(()))) for _ in range(3)]

    assert numbers(draw) == numbers(Recorded(draw, fallback=False))
