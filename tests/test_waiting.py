"""Bars for queries that take long: at a terminal, from one second on, of the outermost loop only, and gone at the end."""

import io
import sys

import pyro
import pytest
import torch

import pgen
from pgen.algorithms.progress import followed, heard
from pgen.distributions import Energy
from pgen.waiting import WaitingBar, waiting


def listened():
    told = []
    return told, lambda *step: told.append(step)


def raising():
    for i in followed(range(5), "raising"):
        1 / i


def test_only_the_outermost_loop_is_told_of():
    told, listener = listened()
    with heard(listener):
        for _ in followed(range(2), "outer"):
            assert list(followed("ab", "inner")) == ["a", "b"]
        assert list(followed(range(1), "after")) == [0]
    assert told == [
        ("outer", 0, 2), ("outer", 1, 2), ("outer", 2, 2),
        ("after", 0, 1), ("after", 1, 1),
    ]  # fmt: skip
    assert list(followed(range(3), "unheard")) == [0, 1, 2]
    assert len(told) == 5


def test_a_loop_that_breaks_off_leaves_the_next_one_to_be_heard():
    told, listener = listened()
    with heard(listener):
        for i in followed(range(5), "broken"):
            if i == 1:
                break
        with pytest.raises(ZeroDivisionError):
            raising()
        list(followed(range(1), "next"))
    assert [what for what, _, _ in told] == ["broken", "broken", "raising", "next", "next"]


def test_the_bar_waits_draws_and_goes():
    quick, slow = io.StringIO(), io.StringIO()
    for stream, patience in ((quick, 100.0), (slow, 0.0)):
        bar = WaitingBar(stream, patience)
        with heard(bar):
            for _ in followed(range(50), "annealing"):
                bar._drawn = 0.0  # as if a tenth of a second had passed
        assert bar._bar is None
    assert quick.getvalue() == ""
    assert "annealing" in slow.getvalue()
    assert "49/50" in slow.getvalue()


@pytest.mark.parametrize(("progress", "shown"), [(None, True), (False, False)])
def test_queries_show_how_far_they_are_at_a_terminal(monkeypatch, progress, shown):
    def program(n):
        with pyro.plate("data", n):
            pyro.sample("x", Energy(lambda x: x.square().sum(-1) / 2, (3,)))

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    fitted = pgen.fit(program, None, "exact", run=pgen.Run(progress=False))
    fitted._progress = progress
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr("pgen.waiting._PATIENCE", 0.0)
    monkeypatch.setattr("pgen.waiting._INTERVAL", 0.0)
    fitted.log_prob({"x": torch.zeros(2, 3)}, seed=0)
    assert ("annealing up" in sys.stderr.getvalue()) is shown


def test_nobody_listens_where_nobody_looks():
    with waiting():
        told, listener = listened()
        with heard(listener), waiting(False):
            list(followed(range(3), "quiet"))
    assert told == []
