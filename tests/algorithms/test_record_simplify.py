"""Each way of making a tape shorter: that it does, and that a wrong variant of it is found out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pgen.algorithms.record import (
    Op,
    Recorded,
    Ref,
    Tape,
    buffers,
    builder,
    columns,
    outputs,
    simplify,
    stacks,
    sums,
    writes,
)
from pgen.algorithms.record import tape as tapes
from tests.algorithms.record_laws import check, same

aten = torch.ops.aten


def operations(fn: Any, *args: Tensor) -> Counter[str]:
    """What is left of a function."""
    (recording,) = check(fn, args, args).recordings.values()
    return Counter(op.name for op in recording.tape.ops)


def t(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def test_what_changes_nothing_goes() -> None:
    def noise(x: Tensor) -> Tensor:
        y = (x * 1 + 0) / 1 - torch.zeros_like(x)
        return (
            y.view(x.shape).unsqueeze(0).squeeze(0).expand(x.shape).clone().detach() ** 1
            + y.new_zeros(3).sum()
            + x
        )

    assert operations(noise, t(2, 3)) == {"aten.add.Tensor": 1}


def test_the_gradient_of_a_weighted_square_is_one_product() -> None:
    weight = torch.rand(3, dtype=torch.float64)

    def slope(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(0.5 * (x * x * weight).sum(-1).sum(), x)[0]

    assert operations(slope, t(4, 3)) == {"aten.mul.Tensor": 1}
    assert operations(slope, t(50_000, 3)) == {"aten.mul.Tensor": 1}  # a constant for all rows stays one
    # A number that is read elsewhere is kept, and is not computed twice.
    assert operations(lambda x: (y := x * 3.0, y + y), t(3))["aten.add.Tensor"] == 1


def test_constants_are_computed_once_and_equal_ones_are_one() -> None:
    def run(x: Tensor) -> Tensor:
        return x.sin() * torch.ones(3).exp().sum() + x.cos() * (torch.ones(3).exp() * torch.eye(3)).sum()

    assert operations(run, t(3)) == {
        "aten.sin.default": 1,
        "aten.cos.default": 1,
        "aten.mul.Tensor": 1,
        "aten.add.Tensor": 1,
    }


def test_the_same_is_done_once_and_what_nobody_reads_never() -> None:
    def run(x: Tensor) -> Tensor:
        x.exp().sum()
        return x.sin() * x.sin().tanh() * x.sin().tanh()

    assert operations(run, t(3)) == {"aten.sin.default": 1, "aten.tanh.default": 1, "aten.mul.Tensor": 2}


def test_constants_merge() -> None:
    c = t(3)
    assert operations(lambda x: ((x - c) - 2.0 + c * 3) - 0.5, t(2, 3)).total() == 1
    assert operations(lambda x: -((x * 2) / c) * 5, t(2, 3)).total() == 1
    assert operations(lambda x: x.neg().neg(), t(3)) == {"aten.clone.default": 1}


def test_views_of_views_and_sums_of_sums_are_one() -> None:
    assert operations(lambda x: x.unsqueeze(0).unsqueeze(2).view(6).sin(), t(6)) == {"aten.sin.default": 1}
    assert operations(lambda x: x.sin().sum(2).sum(0), t(40, 9, 30))["aten.sum.dim_IntList"] == 1


def test_what_repeats_is_computed_once() -> None:
    def run(x: Tensor) -> Tensor:
        return x[:, None].expand(3, 50, 3).exp().log1p() * torch.arange(50.0, dtype=x.dtype)[:, None]

    fast = check(run, (t(3, 3),))
    (recording,) = fast.recordings.values()
    x = t(3, 3)
    sizes = [
        recording.tape.run([x])[i].numel()
        for op in recording.tape.ops
        for i in op.gives()
        if "exp" in op.name
    ]
    assert sizes == [9]


def test_looking_up_everything_in_order_is_a_view() -> None:
    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        y = x[:, torch.arange(3)[:, None]].sin()
        return y, torch.autograd.grad(y.sum(), x)[0]

    assert not {"aten.index.Tensor", "aten.index_put.default"} & set(operations(run, t(5, 3)))


def test_gradients_of_many_uses_are_added_before_they_go_back() -> None:
    table = t(6, 4)

    def run(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        total = sum((x.exp().cumsum(0).view(2, 2) * table[i].view(2, 2)).sum() ** 3 for i in range(6))
        return torch.autograd.grad(total, x)[0]

    assert (
        operations(run, t(4))["aten.mul.Tensor"] < 12
    )  # one for each use, and twice on the way, if taken one by one


def test_operations_of_one_kind_are_done_at_once() -> None:
    table = t(20, 3)

    def run(x: Tensor) -> Tensor:
        return torch.stack([(x * table[i]).sin().exp() for i in range(20)]).sum(0)

    found = operations(run, t(5, 3))
    assert found["aten.sin.default"] == found["aten.exp.default"] == 1
    assert found.total() < 8


def test_a_chain_waits_for_itself() -> None:
    def run(x: Tensor) -> Tensor:
        state = x
        for _ in range(20):
            state = state.sin() + x
        return state

    assert operations(run, t(5, 3)) == {"aten.sin.default": 20, "aten.add.Tensor": 20}


def test_chains_lie_last_in_memory_where_that_pays() -> None:
    def run(q: Tensor) -> Tensor:
        x = q.view(-1, 3, 3)
        for _ in range(12):
            x = (x + x.sum(2, keepdim=True)).tanh() * x.sum(1, keepdim=True).exp()
        return x.sum((1, 2))

    (found,) = check(run, (t(256, 9),)).recordings.values()
    values = found.tape.run([t(256, 9)])
    layouts = Counter(
        values[i].stride()[0] for op in found.tape.ops for i in op.gives() if values[i].dim() == 3
    )
    assert layouts.most_common(1)[0][0] == 1


# --- wrong variants ---------------------------------------------------------------------------------------------


def spoiled(
    monkeypatch: pytest.MonkeyPatch, module: Any, name: str, wrong: Any, fn: Any, *args: Tensor
) -> None:
    """With a wrong pass, what it gives is found out, and the function is right all the same."""
    monkeypatch.setattr(module, name, wrong)
    fast = Recorded(fn, fallback=False)
    for _ in range(2):
        again = [a.clone() for a in args]
        torch.manual_seed(3)
        expected = fn(*(a.clone() for a in args))
        torch.manual_seed(3)
        same(fast(*again), expected)
    (found,) = fast.recordings.values()
    assert found.trouble is not None


def after(change: Callable[[Tape], Tape], original: Any) -> Any:
    return lambda tape, *rest: change(original(tape, *rest))


def test_folding_a_draw_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(tape: Tape, values: dict[int, Tensor], guarded: set[int]) -> Tape:
        drawn = {i: values[i] for op in tape.ops if op.random for i in op.gives()}
        ops = [op for op in tape.ops if not op.random]
        return replace(tape, constants={**tape.constants, **drawn}, ops=ops)

    spoiled(monkeypatch, simplify, "folded", wrong, lambda x: x * torch.rand(3), t(3))


def test_merging_draws_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tapes.Op, "movable", True)
    spoiled(
        monkeypatch,
        simplify,
        "is_free",
        lambda op, guarded: True,
        lambda x: torch.rand(3) - torch.rand(3) * x,
        t(3),
    )


def test_merging_over_a_write_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def fn(x: Tensor, y: Tensor) -> Tensor:
        before = y[1:].exp()
        y[:2] += x
        return before * y[1:].exp()

    for module in (simplify, builder):
        monkeypatch.setattr(module, "is_free", lambda op, guarded: op.movable)
    spoiled(monkeypatch, simplify, "guarded_in", lambda tape, values: set(), fn, t(2), t(3))


def test_dropping_what_is_read_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = after(lambda tape: replace(tape, ops=tape.ops[:-1]), simplify.alive)
    spoiled(monkeypatch, simplify, "alive", wrong, lambda x: x.sin().exp(), t(3))


def test_dropping_a_write_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def fn(x: Tensor, running: Tensor) -> Tensor:
        running.add_(x)
        return x * 2

    wrong = after(lambda tape: replace(tape, ops=[op for op in tape.ops if not op.writes()]), simplify.alive)
    spoiled(monkeypatch, simplify, "alive", wrong, fn, t(3), t(3))


def test_taking_a_write_for_private_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def fn(x: Tensor) -> Tensor:
        y = x * 2
        view = y.view(-1)
        y.add_(1)
        return view * 3

    wrong = lambda seen, at: next(iter(seen.tape.ops[at].writes()), None)  # noqa: E731
    spoiled(monkeypatch, writes._Seen, "only_target", wrong, fn, t(2, 2))


def test_taking_any_number_for_neutral_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = lambda argument, number, tape: isinstance(argument, (int, float))  # noqa: E731
    spoiled(monkeypatch, simplify, "is_all", wrong, lambda x: x * 3 + 1, t(3))


def test_taking_all_for_linear_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = lambda b, op: (0,)  # noqa: E731
    spoiled(monkeypatch, sums, "_linear_in", wrong, lambda x: x.exp() + x.roll(1, 0).exp(), t(3))


def test_repeating_what_differs_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simplify, "compressed", lambda value: value[:1].expand(value.shape))
    table, x = t(3), t(3)
    same(Recorded(lambda x: x * table, fallback=False)(x), x * table)


def test_a_wrong_order_of_draws_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(tape: Tape, *_: Any) -> Tape:
        swapped = [
            replace(op, func=aten.rand.default) if op.func is aten.randn.default else op for op in tape.ops
        ]
        return replace(tape, ops=swapped)

    spoiled(monkeypatch, simplify, "steady", wrong, lambda x: x * torch.randn(3), t(3))


def test_a_wrong_place_in_memory_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(op: Op, values: dict[int, Tensor]) -> bool:
        return True

    spoiled(
        monkeypatch,
        buffers,
        "_in_place",
        wrong,
        lambda x: ((x * 2) @ (x * 2).sin()).exp().sum(0) / 1e30,
        t(90, 90),
    )


def test_a_wrong_reduction_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(columns._UNROLLED, aten.sum.dim_IntList, aten.maximum.default)
    spoiled(monkeypatch, simplify, "_GAIN", 1e9, lambda x: x.view(-1, 3, 3).exp().sum(2), t(256, 9))


def test_sharing_memory_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of results that only the tape shares: without them, who writes to one would write to the other."""
    monkeypatch.setattr(
        outputs,
        "_copy",
        lambda number, value, like, fresh: [Op(aten.detach.default, (Ref(number),), {}, Ref(fresh))],
    )
    fast = Recorded(lambda x: (x + 1, x + 1), fallback=False)
    one, other = fast(t(3))
    assert one.data_ptr() == other.data_ptr()  # the specimen; the law is in test_record_state.py


# --- pieces put together again (stacks.py) ---


def test_pieces_in_order_are_a_view_and_out_of_order_one_operation() -> None:
    def loop(x: Tensor) -> Tensor:
        return torch.stack([x[:, i] for i in range(2, 8)], 1).exp()

    def mirrored(x: Tensor) -> Tensor:
        return torch.stack([x[:, i] for i in reversed(range(8))], 1).exp()

    assert operations(loop, t(3, 10)) == {"aten.slice.Tensor": 1, "aten.exp.default": 1}
    assert operations(mirrored, t(3, 10)) == {"aten.index_select.default": 1, "aten.exp.default": 1}


def test_pieces_of_two_tensors_and_one_of_its_own() -> None:
    def braided(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        pairs = [part for i in range(8) for part in (x[i], y[7 - i])]
        return torch.stack([z, *pairs], 2).cos()

    left = operations(braided, t(8, 2, 3), t(8, 2, 3), t(2, 3))
    assert left["aten.select.int"] == 0
    assert left["aten.stack.default"] == 0
    assert left["aten.index_select.default"] == 1
    assert left.total() <= 7


def test_a_sum_does_not_mind_the_order() -> None:
    def total(x: Tensor) -> Tensor:
        return torch.stack([x[i] for i in (3, 1, 0, 2)]).sum(0)

    assert operations(total, t(4, 5)) == {"aten.sum.dim_IntList": 1}

    def twice(x: Tensor) -> Tensor:  # not every piece once
        return torch.stack([x[i] for i in (3, 1, 1, 2)]).sum(0)

    assert operations(twice, t(4, 5))["aten.index_select.default"] == 1


def test_a_wrong_place_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def shifted(b: Any, whole: Any, dim: int, at: Any) -> Any:
        return right(b, whole, dim, [at[-1], *at[:-1]])

    right = stacks.selected
    monkeypatch.setattr(stacks, "selected", shifted)

    def loop(x: Tensor) -> Tensor:
        return torch.stack([x[:, i] for i in range(2, 8)], 1).exp()

    fast = Recorded(loop)
    x = t(3, 10)
    same(fast(x), loop(x))
    (recording,) = fast.recordings.values()
    assert recording.trouble is not None


# --- what a support's check leaves (rewrite.py) ---


def test_checks_that_cannot_fail_go() -> None:
    def half_cauchy(x: Tensor) -> Tensor:
        y = x.exp()
        inside = torch.where(y < 0, -torch.inf, -(y**2).log1p())
        return inside.masked_fill(y < 0, -torch.inf) + (y - torch.zeros(4)) * torch.ones(4)

    left = operations(half_cauchy, t(3, 4))
    assert left.keys() <= {
        f"aten.{name}"
        for name in (
            "exp.default",
            "pow.Tensor_Scalar",
            "log1p.default",
            "neg.default",
            "sub.Tensor",
            "add.Tensor",
        )
    }
    assert left.total() <= 5


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), -1e9])
def test_at_the_ends_of_the_line_too(bad: float) -> None:
    def masked(x: Tensor) -> Tensor:
        y = x.exp()
        return (1 / y).masked_fill(y < 0, -1.0) + (x - 0.0).masked_fill(x.exp() <= 0, 7.0)

    fast = Recorded(masked)
    fast(t(3))
    same(
        fast(torch.tensor([bad, 0.0, 1.0], dtype=torch.float64)),
        masked(torch.tensor([bad, 0.0, 1.0], dtype=torch.float64)),
    )


def test_a_check_that_can_fail_stays() -> None:
    assert operations(lambda x: x.masked_fill(x < 0, 1.0), t(3))["aten.lt.Scalar"] == 1
    assert operations(lambda x: x.masked_fill(x.exp() <= 0, 1.0), t(3))["aten.le.Scalar"] == 1
    assert operations(lambda x: x.masked_fill(x.exp() < 1, 1.0), t(3))["aten.lt.Scalar"] == 1


def test_pieces_put_together_lie_as_they_did_where_random_numbers_are_drawn() -> None:
    """In the order of memory: a transpose in place of the stack would get them in another one."""

    def run(x: Tensor) -> Tensor:
        whole = torch.stack((x.t() * 2).unbind(1), 1) + 1
        return torch.empty_like(whole).exponential_() + whole.sum()

    (recording,) = check(run, (t(4, 5),), (t(4, 5),)).recordings.values()
    assert recording.trouble is None
    assert "aten.stack.default" not in {op.name for op in recording.tape.ops}
