"""Changes in place and shared memory: a recorded function does to the world what the function does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pgen.algorithms.record import NotRecorded, Recorded, record
from tests.algorithms.record_laws import check, same


def on_fresh(x: Tensor) -> Tensor:
    y = torch.zeros(3)
    y.add_(1)
    a = y * 2
    y.add_(x).mul_(y)
    b = y * 3
    y.copy_(x)
    return a + b + y


def through_views(x: Tensor) -> tuple[Tensor, Tensor]:
    y = x.expand(4, 3).clone()
    y[1] = 7
    y[:, 0].mul_(2)
    v = y.view(-1)
    v[2:5].exp_()
    y.t().add_(1)
    return y, v


def seen_through_another_view(x: Tensor) -> tuple[Tensor, Tensor]:
    y = x * 2
    v = y.view(-1)
    before = v + 0
    y.add_(1)
    return before, v * 1


def masked(x: Tensor) -> Tensor:
    y = x.clone()
    y[y > 0] = 0.5
    y.masked_fill_(y < -1, -1).clamp_(min=-0.7)
    y.index_put_((torch.tensor([0]),), x[2])
    return y.scatter_(0, torch.tensor([1]), x[:1]).index_fill_(0, torch.tensor([2]), 3.0)


def narrow_into_wide(x: Tensor) -> Tensor:
    y = torch.ones(3, dtype=torch.float32)
    y.add_(x.double() * 1.7)  # stays single
    n = torch.ones(3, dtype=torch.int64)
    n.add_(2)
    return y * n


def metadata(x: Tensor) -> Tensor:
    y = (x * 2).unsqueeze(0)
    y.t_()
    z = y.clone()
    z.squeeze_(1).unsqueeze_(0)
    return y @ z


def with_out(x: Tensor) -> tuple[Tensor, Tensor]:
    buffer = torch.empty(3)
    torch.add(x, 1, out=buffer)
    first = buffer * 2
    torch.mul(x, buffer, out=buffer)
    values, indices = torch.empty(3), torch.empty(3, dtype=torch.long)
    torch.sort(x, out=(values, indices))
    return first + buffer, values[indices]


def lists(x: Tensor) -> list[Tensor]:
    items = [x + i for i in range(3)]
    torch._foreach_mul_(items, 2.0)
    more = torch._foreach_add(items, items)
    torch._foreach_addcdiv_(items, more, more)
    return [*items, *more, *torch._foreach_norm(more)]


def rebuilt(x: Tensor) -> Tensor:
    out = torch.empty(4, 3)
    for i in range(4):
        out[i] = x * i
    total = torch.zeros(())
    for row in out:
        total += row.sum()
    out += total
    return out


FRESH = [
    on_fresh,
    through_views,
    seen_through_another_view,
    masked,
    narrow_into_wide,
    metadata,
    with_out,
    lists,
    rebuilt,
]


@pytest.mark.parametrize("simplify", [True, False])
@pytest.mark.parametrize("fn", FRESH)
def test_writes_to_fresh_tensors(fn: Any, simplify: bool) -> None:
    check(fn, (torch.randn(3),), (torch.randn(3),), simplify=simplify)


def count(x: Tensor, n: Tensor) -> Tensor:
    n += 1
    return x * n


def average(x: Tensor, running: dict[str, Tensor]) -> Tensor:
    before = running["mean"] * 1
    running["mean"].lerp_(x.mean(0), 0.1)
    running["rows"][1:].view(-1).add_(x.sum())
    return x - running["mean"] + before


def reads_then_writes(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    a = y.view(-1)
    b = a.clone()
    y.mul_(x)
    return a, b


@pytest.mark.parametrize("simplify", [True, False])
def test_inputs_are_changed_in_place(simplify: bool) -> None:
    check(count, (torch.randn(3), torch.zeros(())), (torch.randn(3), torch.ones(())), simplify=simplify)
    running = {"mean": torch.zeros(3), "rows": torch.ones(3, 2)}
    check(average, (torch.randn(5, 3), running), (torch.randn(5, 3), running), simplify=simplify)
    check(reads_then_writes, (torch.randn(2, 3), torch.randn(2, 3)), simplify=simplify)


def test_running_statistics_as_arguments() -> None:
    def normalise(x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        y = nn.functional.batch_norm(x, mean, var, training=True)
        return torch.autograd.grad(y.cos().sum(), x)[0]

    check(
        normalise,
        (torch.randn(6, 3), torch.zeros(3), torch.ones(3)),
        (torch.randn(6, 3), torch.ones(3), torch.ones(3)),
    )


def test_buffers_of_a_captured_module() -> None:
    modules = [nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, momentum=m)) for m in (0.1, 0.1)]
    modules[1].load_state_dict(modules[0].state_dict())
    fast = Recorded(lambda x: modules[0](x), fallback=False)
    for _ in range(4):
        x = torch.randn(5, 3)
        same(fast(x), modules[1](x))
        same(modules[0].state_dict(), modules[1].state_dict())
    assert int(modules[0][1].num_batches_tracked) == 4


def test_captured_tensors_that_others_change() -> None:
    weight, offset, table = torch.ones(3), torch.zeros(2, 3), torch.eye(3)
    fast = Recorded(lambda x: x @ table * weight.exp() + offset[1] + table.sum(), fallback=False)

    def expected(x: Tensor) -> Tensor:
        return x @ table * weight.exp() + offset[1] + table.sum()

    for change in (
        lambda: None,
        lambda: weight.add_(1),
        lambda: offset[1].fill_(3),
        lambda: weight.data.mul_(2).add_(0),
    ):
        change()
        x = torch.randn(2, 3)
        if change is not None:
            weight.add_(0.5)
        same(fast(x), expected(x))
        same(fast(x), expected(x))
    (recording,) = fast.recordings.values()
    tape = recording.tape
    for _ in range(3):  # from now on read anew, without another recording
        weight.add_(1)
        same(fast(torch.ones(2, 3)), expected(torch.ones(2, 3)))
    assert next(iter(fast.recordings.values())).tape is tape


def test_optimisation_of_captured_parameters() -> None:
    def losses(wrap: Any) -> list[float]:
        torch.manual_seed(0)
        module = nn.Linear(3, 1)
        optimiser = torch.optim.Adam(module.parameters(), lr=0.1)
        x = torch.randn(8, 3)

        def loss(x: Tensor) -> Any:
            value = module(x).square().mean()
            return value.detach(), torch.autograd.grad(value, list(module.parameters()))

        fast, found = wrap(loss), []
        for _ in range(5):
            value, gradients = fast(x)
            for p, g in zip(module.parameters(), gradients, strict=True):
                p.grad = g
            optimiser.step()
            found.append(float(value))
        return found

    assert losses(record) == pytest.approx(losses(lambda fn: fn), rel=1e-6)


def test_backward_into_captured_parameters_is_refused() -> None:
    weight = torch.ones(3, requires_grad=True)

    def run(x: Tensor) -> Tensor:
        (weight * x).sum().backward()
        return x * 1

    fast = record(run)
    with pytest.warns(NotRecorded, match=r"\.backward\(\)"):
        fast(torch.ones(3))
    weight.grad = None
    fast(torch.ones(3))
    assert weight.grad is not None
    own = Recorded(lambda x: _own_backward(x), fallback=False)
    same(own(torch.ones(3)), torch.full((3,), 2.0))
    same(own(torch.full((3,), 3.0)), torch.full((3,), 6.0))


def _own_backward(x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    x.square().sum().backward()
    return x.grad


def test_memory_that_the_kinds_of_two_calls_share_differently() -> None:
    def into(x: Tensor, y: Tensor) -> Tensor:
        x.mul_(2)
        return x + y

    fast = Recorded(into, fallback=False)
    for _ in range(2):
        one, other = torch.ones(3), torch.ones(3)
        same(fast(one, other), torch.full((3,), 3.0))
        assert one.tolist() == [2, 2, 2]
        same(fast(one, one), torch.full((3,), 8.0))
        base = torch.arange(4.0)
        same(fast(base[:3], base[1:]), torch.tensor([2.0, 6.0, 7.0]))
    pure = Recorded(lambda x, y: (x + y, x * y), fallback=False)
    one = torch.full((3,), 3.0)
    same(pure(one, one), (one + one, one * one))
    same(pure(one, one * 2), (one * 3, one * one * 2))


CONSTANT = torch.arange(3.0)
RESULTS = {
    "an input": lambda x: x,
    "a copy of an input": lambda x: x.clone(),
    "an input times one": lambda x: x * 1 + 0,
    "a view of an input": lambda x: (x[1:], x.view(1, 3)),
    "a captured tensor": lambda x: CONSTANT,
    "what is always the same": lambda x: (torch.ones(3) * 2, torch.zeros(2, 3).t(), x),
    "made of numbers": lambda x: torch.tensor([1.0, 2.0, 3.0]),
    "the same thing twice": lambda x: (x + 1, x + 1),
    "one tensor twice": lambda x: (lambda y: (y, y))(x + 1),
    "a tensor and its view": lambda x: (lambda y: (y, y[1:], y.view(3, 1)))(x + 1),
    "zeros, twice": lambda x: (torch.zeros_like(x), torch.zeros_like(x), x.new_zeros(3)),
    "one and zeros": lambda x: {"a": (torch.zeros(2), None), "b": [x, x.detach(), x.expand(2, 3)]},
}


@pytest.mark.parametrize("name", RESULTS)
def test_results_share_memory_as_those_of_the_function_do(name: str) -> None:
    fn = RESULTS[name]
    fast = check(fn, (torch.randn(3),), (torch.randn(3),))
    x = torch.randn(3)
    assert _sharing([*_flat(fast(x)), x, CONSTANT]) == _sharing([*_flat(fn(x)), x, CONSTANT])
    for result in _flat(fast(x)):
        if result.data_ptr() not in (x.data_ptr(), CONSTANT.data_ptr()) and result._is_view() is False:
            result.add_(1)
    same(fast(x), fn(x))


def _flat(result: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(result) if isinstance(leaf, Tensor)]


def _sharing(tensors: list[Tensor]) -> list[list[bool]]:
    places = [t.untyped_storage().data_ptr() for t in tensors]
    return [[a == b for b in places] for a in places]


def test_a_result_that_might_hide_tensors_is_refused() -> None:
    class Box:
        def __init__(self, x: Tensor) -> None:
            self.x = x

    fast = record(lambda x: Box(x * 2))
    with pytest.warns(NotRecorded, match="Box"):
        assert fast(torch.ones(1)).x == 2
    assert fast(torch.ones(1) * 2).x == 4
