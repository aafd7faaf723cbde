"""What cannot be recorded: the message names the user's line, and the function is run as it is."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from pgen.algorithms.record import NotRecorded, Recorded, Unrecordable, record
from tests.algorithms.record_laws import same


def branch(x: Tensor) -> Tensor:
    if x.sum() > 0:  # here
        return x
    return -x


def unchanged_item(x: Tensor) -> Tensor:
    return x * x.max().item()  # here


def loop(x: Tensor) -> Tensor:
    for _ in range(int(x.abs().sum())):  # here
        x = x * 2
    return x


def mask(x: Tensor) -> Tensor:
    return x[x > 0].sum()  # here


def nonzero(x: Tensor) -> Tensor:
    return x.nonzero().sum()  # here


def unique(x: Tensor) -> Tensor:
    return torch.unique(x).sum()  # here


def to_list(x: Tensor) -> Tensor:
    return torch.tensor(x.tolist()) * 2  # here


def to_numpy(x: Tensor) -> Tensor:
    return torch.from_numpy(x.numpy() * 2)  # here


def drawn(x: Tensor) -> Tensor:
    return x * float(torch.rand(()))  # here


def equal(x: Tensor) -> Tensor:
    return x if torch.equal(x, x * 2) else x + 1  # here


def close(x: Tensor) -> Tensor:
    return x if torch.allclose(x, x * 2) else x + 1  # here


def index(x: Tensor) -> Tensor:
    return torch.tensor([[1.0, 2.0], [3.0, 4.0]])[int(x.argmax())]  # here


def swapped(x: Tensor) -> Tensor:
    y = x.clone()
    y.data = x * 2  # here
    return y


def batched(x: Tensor) -> Tensor:
    return torch.vmap(lambda one: one if one.sum() > 0 else -one)(x.expand(2, 2))  # here


def in_a_gradient(x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad((x.square().sum() if x[0] > 0 else x.sum()), x)[0]  # here


def read_after_a_write(x: Tensor) -> Tensor:
    table = torch.zeros(4)
    table[1:3] = x
    return x if table[1].item() > 0 else x * 2  # here


FUNCTIONS = [
    branch, unchanged_item, loop, mask, nonzero, unique, to_list, to_numpy, drawn, equal, close, index, swapped, batched,
    in_a_gradient, read_after_a_write,
]  # fmt: skip


@pytest.mark.parametrize("fn", FUNCTIONS)
def test_the_line_is_named(fn: Any) -> None:
    with pytest.raises(Unrecordable) as caught:
        Recorded(fn, fallback=False)(torch.tensor([1.0, 3.0]))
    assert caught.value.where is not None
    path, _, rest = caught.value.where.partition(".py:")
    assert path.endswith("test_record_refused")
    assert "# here" in rest
    assert caught.value.where in str(caught.value)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("fn", [f for f in FUNCTIONS if f not in (batched,)])
def test_the_function_itself_takes_over_with_one_warning(fn: Any) -> None:
    fast = record(fn)
    inputs = [torch.tensor([1.0, 3.0]), torch.tensor([-1.0, -2.0]), torch.tensor([2.0, 3.0])]
    expected = [_seeded(fn, x) for x in inputs]
    with pytest.warns(NotRecorded, match="here") as caught:
        found = [_seeded(fast, x) for x in inputs]
    same(found, expected)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert isinstance(fast.obstacle, Unrecordable)


def _seeded(fn: Any, x: Tensor) -> Any:
    torch.manual_seed(0)
    return fn(x)


def test_an_error_of_the_function_is_its_own() -> None:
    fast = record(lambda x: x @ x)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="1D tensors expected|mat1 and mat2|inconsistent|size"):
            fast(torch.ones(2, 3))
    same(fast(torch.ones(2, 2)), torch.full((2, 2), 2.0))


def constants(x: Tensor) -> Tensor:
    table = torch.tensor([0.0, 1.0, 2.0])
    if table.sum() > 1 and table.max().item() == 2 and table[table > 0].tolist() == [1, 2]:
        x = x * table.numpy().sum()
    return x[:, table.nonzero()[:, 0]] + len(torch.unique(table)) + x[:, table > 0]


def test_values_that_depend_on_nothing_may_be_read() -> None:
    fast = Recorded(constants, fallback=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            x = torch.randn(2, 3)
            same(fast(x), constants(x))


def test_a_flag_that_changes_is_read_anew_or_refused() -> None:
    flag = torch.tensor(1.0)

    def turn(x: Tensor) -> Tensor:
        return x * 2 if flag > 0 else x * 3

    fast = record(turn)
    assert fast(torch.ones(1)) == 2
    flag.fill_(-1)
    with pytest.warns(NotRecorded, match="flag > 0"):
        assert fast(torch.ones(1)) == 3
    flag.fill_(1)
    assert fast(torch.ones(1)) == 2


def test_sparse_tensors_and_subclasses_run_as_they_are() -> None:
    fast = record(lambda x: x.to_dense() * 2 if x.is_sparse else x * 2)
    sparse = torch.eye(2).to_sparse()
    with pytest.warns(NotRecorded, match="sparse"):
        same(fast(sparse), torch.eye(2) * 2)

    class Tagged(torch.Tensor):
        pass

    fast = record(lambda x: x * 2)
    with pytest.warns(NotRecorded, match="Tagged"):
        assert isinstance(fast(torch.ones(2).as_subclass(Tagged)), Tagged)
    with pytest.raises(TypeError, match="hash"):
        fast(torch.ones(2), {1, 2})
