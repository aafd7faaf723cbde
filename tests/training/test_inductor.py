"""Compiled replays: draws are torch's own, in the program's order, and parameters go in as they are."""

import time

import pytest
import torch
from torch import nn

from pgen.algorithms.record import Ref, replay_of
from pgen.algorithms.record.recording import recording_of
from pgen.run import Run
from pgen.training.inductor import COMPILERS, Parts, compiled
from tests.training.test_replays import Autoencoder, alike


def noisy(weight):
    """A function with draws before, between and after what is computed."""

    def function(x):
        h = nn.functional.dropout(x @ weight, 0.3, training=True)
        z = h.tanh() + torch.randn_like(h)
        (slope,) = torch.autograd.grad((z.square().mean() * torch.rand(())).sum(), weight)
        return z.sum(), slope

    return function


def recorded():
    torch.manual_seed(0)
    weight, x = torch.randn(4, 3, requires_grad=True), torch.randn(5, 4)
    return recording_of(noisy(weight), [x], live=[weight]).tape, x, weight


def test_draws_are_apart_from_what_is_compiled():
    tape, x, _ = recorded()
    parts = Parts.of(tape, [x.clone()])
    assert not any(op.random for op in parts.rest.ops)
    assert len(parts.rest.ops) > 5
    # The matrix product is not among what is drawn, though dropout follows it: a mask needs its shape only.
    assert any("mm" in op.name for op in parts.rest.ops)


def test_taken_apart_a_tape_gives_the_same():
    """Without the compiler: draws, then the rest, are the whole."""
    tape, x, _ = recorded()
    parts = Parts.of(tape, [x.clone()])
    rest = replay_of(type(tape)(parts.given, {}, parts.rest.ops, parts.rest.outputs))
    found = []
    for run in (replay_of(tape), lambda x: rest(x, *parts.captured, *parts.draws(x))):
        torch.manual_seed(3)
        with torch.no_grad():
            found.append([*run(x), torch.rand(2)])
    assert alike(*found)
    assert isinstance(parts.rest.ops[0].out, (Ref, tuple, list))


@pytest.mark.slow
def test_a_compiled_tape_gives_the_same_also_when_weights_move():
    tape, x, weight = recorded()
    fast, plain = compiled(tape, [x.clone()]), replay_of(tape)
    for _ in range(3):
        with torch.no_grad():
            weight.mul_(0.5)
            found = []
            for run in (plain, fast):
                torch.manual_seed(3)
                found.append([*run(x), torch.rand(2)])
        assert alike(*found)


@pytest.mark.slow
@pytest.mark.parametrize("compiler", [name for name in COMPILERS if name != "auto"])
def test_a_compiled_fit_gives_the_same(compiler):
    class Wait:
        """Until the other process is done."""

        def start(self, run, total): ...

        def step(self, index, metrics):
            if compiler == "background" and 10 < index < 200:
                time.sleep(0.1)

        def finish(self, history): ...

    results = []
    for how in (False, compiler):
        subject = Autoencoder()
        run = Run(steps=300, batch_size=16, lr=1e-2, schedule="constant", compile=how, observers=(Wait(),))
        results.append((subject.fit(run), subject.tensors()))
    (written, one), (fast, other) = results
    assert fast.warnings == ()
    assert alike([written["loss"]], [fast["loss"]], 1e-2)
    assert alike(one, other, 1e-2)


def test_what_cannot_be_compiled_is_replayed(monkeypatch):
    def broken(tape, inputs):
        raise NotImplementedError("no kernel for this")

    monkeypatch.setitem(COMPILERS, "inductor", broken)
    results = []
    for how in (False, "inductor"):
        subject = Autoencoder()
        run = Run(steps=30, batch_size=16, lr=1e-2, compile=how)
        results.append((subject.fit(run), subject.tensors()))
    (_, one), (fast, other) = results
    assert fast.warnings == (
        "player 'net' was replayed without being compiled: NotImplementedError: no kernel for this",
    )
    assert alike(one, other)


def test_a_compiler_that_is_wrong_is_not_believed(monkeypatch):
    monkeypatch.setitem(
        COMPILERS,
        "inductor",
        lambda tape, inputs: lambda *given: tuple(1.01 * t for t in replay_of(tape)(*given)),
    )
    subject = Autoencoder()
    history = subject.fit(Run(steps=30, batch_size=16, lr=1e-2, compile="inductor"))
    assert history.warnings == (
        "player 'net' was replayed without being compiled: compiled, its operations give other numbers",
    )
