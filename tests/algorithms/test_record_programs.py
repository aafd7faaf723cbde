"""Random straight-line programs, with views, writes in place and draws: recorded they give what they give."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.algorithms.record_laws import check

ROWS, COLUMNS = 3, 4
Statement = Callable[[list[Tensor]], Tensor | None]

UNARY: list[Callable[[Tensor], Tensor]] = [
    torch.sin, torch.tanh, torch.neg, torch.sigmoid, lambda x: x * 1, lambda x: x + 0, lambda x: x * 0.5,
    lambda x: x - 1.5, lambda x: x**2 / (1 + x**2), lambda x: x.cumsum(0) * 0.3, lambda x: x.softmax(1),
    lambda x: x.clone(), lambda x: x.detach(), lambda x: x.flip(0), lambda x: x.sort(1).values,
    lambda x: x.sum(0, keepdim=True).expand(ROWS, COLUMNS), lambda x: x.mean().expand(ROWS, COLUMNS).clone(),
    lambda x: x.t().contiguous().t(), lambda x: torch.cat([x[:1], x[1:]]), lambda x: torch.stack(x.unbind(1), 1),
    lambda x: torch.zeros_like(x), lambda x: x.new_ones(ROWS, COLUMNS), lambda x: torch.where(x > 0, x, -0.5 * x),
    lambda x: x.index_select(0, torch.tensor([2, 0, 0])), lambda x: torch.arange(12.0).view(ROWS, COLUMNS) / 12,
    lambda x: (x @ x.t()).tanh() @ x * 0.1, lambda x: (x > 0).to(x.dtype), lambda x: x.float().to(x.dtype),
]  # fmt: skip
BINARY: list[Callable[[Tensor, Tensor], Tensor]] = [
    torch.add, torch.sub, torch.maximum, lambda a, b: (a * b).tanh(), lambda a, b: a / (1 + b.abs()),
    lambda a, b: torch.where(a > b, a, b * 0.5), lambda a, b: torch.add(a, b, alpha=0.5), lambda a, b: a.lerp(b, 0.3),
    lambda a, b: torch.logaddexp(a, b) - 1, lambda a, b: torch.addcmul(a, a, b, value=0.1),
]  # fmt: skip
VIEWS: list[Callable[[Tensor], Tensor]] = [
    lambda x: x, lambda x: x[1:], lambda x: x[:, ::2], lambda x: x[0], lambda x: x.t(), lambda x: x[..., None],
    lambda x: x.diagonal(), lambda x: x[1:, 1:3].t(), lambda x: x.unsqueeze(0).squeeze(0),
]  # fmt: skip
WRITES: list[Callable[[Tensor, Tensor], object]] = [
    lambda v, _: v.add_(1), lambda v, _: v.mul_(-0.5), lambda v, _: v.tanh_(), lambda v, _: v.zero_(),
    lambda v, _: v.fill_(0.3), lambda v, o: v.copy_(o.flatten()[: v.numel()].view(v.shape)),
    lambda v, o: v.add_(o.flatten()[: v.numel()].view(v.shape), alpha=0.2), lambda v, _: v.masked_fill_(v > 0.5, 0.1),
    lambda v, _: v.clamp_(-1, 1), lambda v, _: v.normal_(), lambda v, _: v.uniform_(-1, 1), lambda v, _: v.bernoulli_(0.5),
]  # fmt: skip
DRAWS: list[Callable[[Tensor], Tensor]] = [
    torch.randn_like, torch.rand_like, lambda x: torch.bernoulli(x.sigmoid()), lambda x: torch.normal(x, 1.0),
    lambda x: torch.nn.functional.dropout(x, 0.4), lambda x: torch.empty_like(x).exponential_().clamp(max=3),
]  # fmt: skip


def program(
    seed: int, length: int = 14, *, writes: bool = True
) -> Callable[[Tensor, Tensor], tuple[Tensor, ...]]:
    """A program of this many statements over a growing list of tensors, all of one shape but for their views."""
    dice = random.Random(seed)
    constant = torch.linspace(-1, 1, ROWS * COLUMNS).view(ROWS, COLUMNS)
    statements = [_statement(dice, 1.0 if writes else 0.7) for _ in range(length)]
    kept = dice.sample(range(length), 3)

    def run(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        tensors = [x, y, constant.clone() if seed % 2 else constant * 1.0]
        for statement in statements:
            new = statement(tensors)
            tensors.append(tensors[-1] if new is None else new)
        return (*(tensors[3 + i] for i in kept), tensors[-1])

    return run


def _statement(dice: random.Random, most: float) -> Statement:
    kind, a, b = dice.uniform(0, most), dice.random(), dice.random()

    def pick(tensors: list[Tensor], at: float) -> Tensor:
        return tensors[int(at * len(tensors))]

    if kind < 0.35:
        unary = dice.choice(UNARY)
        return lambda tensors: unary(pick(tensors, a))
    if kind < 0.6:
        binary = dice.choice(BINARY)
        return lambda tensors: binary(pick(tensors, a), pick(tensors, b))
    if kind < 0.7:
        draw = dice.choice(DRAWS)
        return lambda tensors: draw(pick(tensors, a))
    view, write = dice.choice(VIEWS), dice.choice(WRITES)

    def written(tensors: list[Tensor]) -> None:
        target = pick(tensors, a)
        if 0 in target.stride():  # memory that overlaps itself cannot be written to
            return
        write(view(target), pick(tensors, b).clone())

    return written


def inputs() -> tuple[Tensor, Tensor]:
    return torch.randn(ROWS, COLUMNS), torch.randn(ROWS, COLUMNS)


@pytest.mark.parametrize("first", range(0, 160, 20))
def test_random_programs(first: int) -> None:
    for seed in range(first, first + 20):
        check(program(seed), inputs(), inputs())


@pytest.mark.slow
@pytest.mark.parametrize("first", range(1000, 4000, 250))
def test_many_random_programs(first: int) -> None:
    for seed in range(first, first + 250):
        check(program(seed, 30), inputs(), inputs())


@pytest.mark.parametrize("first", range(200, 240, 10))
def test_gradients_of_random_programs(first: int) -> None:
    for seed in range(first, first + 10):
        fn = program(seed, writes=False)

        def both(x: Tensor, y: Tensor, fn=fn) -> tuple[Tensor, ...]:
            x = x.detach().requires_grad_()
            results = fn(x * 1, y)
            total = sum((r.sin().sum() for r in results), x.sum() * 0)
            return (*results, torch.autograd.grad(total, x)[0])

        check(both, inputs(), inputs(), tolerance=1e-5)


STEPS: list[Callable[[Tensor, Tensor, Tensor], Tensor]] = [
    lambda x, c, s: (x - c) ** 2 / (1 + s.exp()), lambda x, c, s: torch.where(x > c, x * s, 0.0),
    lambda x, c, s: (x * c).softmax(-1) - s, lambda x, c, s: torch.nn.functional.softplus(x + c) * s.sum(-1, keepdim=True),
    lambda x, c, s: x[..., [2, 0, 1]] * c - s * 0.5, lambda x, c, s: (x.unsqueeze(-1) + s.unsqueeze(-2)).logsumexp(-1) - c,
    lambda x, c, s: x.cumsum(-1) * 2.0 * 0.25 - 1 - 3 + c * s, lambda x, c, s: (x * s).amax(-1, keepdim=True) + c * x,
    lambda x, c, s: x.clamp(-1, 1) / (2 + s.sum(-1, keepdim=True).expand_as(x) ** 2), lambda x, c, s: (x * 3.0).neg().neg() * 0.1 + s,
    lambda x, c, s: torch.stack([x, s], 0).prod(0) + c, lambda x, c, s: x.masked_fill(c > 0, 0.0) + torch.rand_like(s),
]  # fmt: skip


def loop(seed: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """A program that repeats itself: a state that is carried along, terms that are added up, and a gradient."""
    dice = random.Random(seed)
    carried, added = dice.sample(STEPS, 2), dice.sample(STEPS, 2)
    length, table = dice.randint(4, 9), torch.randn(9, 3, dtype=torch.float64)
    kind = dice.choice(["sum", "list", "cat"])

    def energy(x: Tensor, s: Tensor) -> Tensor:
        state, terms = x, []
        for t in range(length):
            term = s * 1
            for step in added:
                term = step(term, table[t], x)
            terms.append(term)
            if dice_carries:
                state = torch.tanh(carried[t % 2](state, table[t], s)) + 0.1 * term
        total = {
            "sum": lambda: sum((term.sum(-1) for term in terms), state.sum(-1)),
            "list": lambda: torch.stack(terms).sum(0).mean(-1) + state.mean(-1),
            "cat": lambda: torch.cat([*terms, state], -1).logsumexp(-1),
        }
        return total[kind]()

    dice_carries = dice.random() < 0.7

    def both(x: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        live = x.detach().requires_grad_()
        value = torch.vmap(energy, randomness="different")(live, s)
        return value.detach(), torch.autograd.grad(value.sum(), live)[0]

    return both


def chains(n: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 3, dtype=torch.float64), torch.randn(n, 3, dtype=torch.float64)


@pytest.mark.parametrize("first", range(0, 40, 10))
def test_programs_that_repeat_themselves(first: int) -> None:
    for seed in range(first, first + 10):
        n = (2, 40)[seed % 2]
        check(loop(seed), chains(n), chains(n), tolerance=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(1000, 1500, 100))
def test_many_programs_that_repeat_themselves(first: int) -> None:
    for seed in range(first, first + 100):
        n = (2, 300)[seed % 2]
        check(loop(seed), chains(n), chains(n), tolerance=1e-9)
