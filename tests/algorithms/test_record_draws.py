"""Draws apart from the rest: they are torch's own, in the function's order, and the rest holds no chance."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pgen.algorithms.record import Tape, replay_of
from pgen.algorithms.record.draws import apart, by_shape, with_masks
from pgen.algorithms.record.recording import recording_of


def recorded() -> tuple[Tape, Tensor]:
    """A function with draws before, between and after what is computed."""
    torch.manual_seed(0)
    weight, x = torch.randn(4, 3, requires_grad=True), torch.randn(5, 4)

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        h = nn.functional.dropout(x @ weight, 0.3, training=True)
        z = h.tanh() + torch.randn_like(h)
        (slope,) = torch.autograd.grad((z.square().mean() * torch.rand(())).sum(), weight)
        return z.sum(), slope

    return recording_of(function, [x], live=[weight]).tape, x


def test_draws_are_apart_from_what_is_computed() -> None:
    tape, x = recorded()
    _, rest, drawn = apart(with_masks(tape, tape.run([x])))
    assert not any(op.random for op in rest.ops)
    assert len(rest.ops) > 5
    assert drawn
    # The matrix product is not among what is drawn, though dropout follows it: a mask needs its shape only.
    assert any("mm" in op.name for op in rest.ops)


def test_taken_apart_a_tape_gives_the_same() -> None:
    tape, x = recorded()
    draws, rest, drawn = apart(with_masks(tape, tape.run([x])))
    computed = replay_of(Tape([*tape.inputs, *drawn], rest.constants, rest.ops, rest.outputs))
    found = []
    for run in (replay_of(tape), lambda x: computed(x, *draws(x))):
        torch.manual_seed(3)
        with torch.no_grad():
            found.append([*run(x), torch.rand(2)])
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-6)


def test_a_draw_in_the_shape_of_a_result_does_not_wait_for_it() -> None:
    def function(x: Tensor) -> Tensor:
        y = x.exp().sin()
        return torch.where(torch.rand_like(y) < 0.5, y, y + torch.randn_like(y))

    x = torch.rand(5, 4)
    tape = recording_of(function, [x]).tape
    assert len(apart(tape)[1].ops) < 6  # what the shapes need is left to what draws
    tape = by_shape(tape, tape.run([x]))
    draws, rest, drawn = apart(tape)
    assert {"aten.exp.default", "aten.sin.default"} <= {op.name for op in rest.ops}
    torch.manual_seed(1)
    expected = function(x)
    torch.manual_seed(1)
    found = replay_of(Tape([*tape.inputs, *drawn], rest.constants, rest.ops, rest.outputs))(x, *draws(x))
    torch.testing.assert_close(found[0], expected)
