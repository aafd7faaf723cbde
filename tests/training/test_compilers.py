"""Fits whose losses are compiled: the same as those that are not, and a way back where a compiler fails."""

import time

import pytest

from pgen.algorithms.record import replay_of
from pgen.run import Run
from pgen.training.compilers import COMPILERS
from tests.training.test_replays import Autoencoder, alike


@pytest.mark.slow
@pytest.mark.parametrize("compiler", [name for name in COMPILERS if name != "auto"])
def test_a_compiled_fit_gives_the_same(compiler, tmp_path, monkeypatch, compiler_cache):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

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
