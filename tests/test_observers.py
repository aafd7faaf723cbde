"""Observers watch: they see every step once, and cannot harm the run."""

import builtins
import io
import json
import math
import sys

import pytest
import torch

from pgen.errors import Diverged, OptionError
from pgen.observers import JsonLines, ProgressBar, TensorBoard, pgen_observers
from pgen.problem import Problem
from pgen.run import Player, Run


def _player(bad=lambda index: False):
    a = torch.zeros(1, requires_grad=True)
    return Player(
        {"a": a}, lambda batch, step: (-a.sum() * (math.nan if bad(step.index) else 1), {"extra": 2})
    )


def _fit(observers, steps=25, bad=lambda index: False, **options):
    player = _player(bad)
    run = Run(steps=steps, observers=observers, **options)
    history = run.optimize({"p": player}, Problem.of(lambda x: x, {"x": torch.randn(20, 1)}))
    return history, player.parameters["a"].item()


class Diary:
    def __init__(self, fail=None):
        self.fail, self.pages = fail, []

    def _write(self, *page):
        self.pages.append(page)
        if page[0] == self.fail:
            raise ZeroDivisionError("out of ink")

    def start(self, run, total):
        self._write("start", run, total)

    def step(self, index, metrics):
        self._write("step", index, metrics)
        metrics.clear()  # its own copy

    def finish(self, history):
        self._write("finish", history)


def test_an_observer_sees_every_step_once():
    diary, second = Diary(), Diary()
    history, _ = _fit((diary, second), validation=0.2, validate_every=10)
    assert diary.pages[0][0] == "start"
    assert (diary.pages[0][1].steps, diary.pages[0][2]) == (25, 25)
    assert diary.pages[-1] == ("finish", history)
    steps = [page[1] for page in diary.pages[1:-1]]
    assert steps == [*range(10), 9, *range(10, 20), 19, *range(20, 25), 24]  # held-out losses at 9, 19 and 24
    assert len(second.pages) == len(diary.pages)


@pytest.mark.parametrize("method", ["start", "step", "finish"])
def test_one_that_fails_is_told_once_and_dropped(method):
    broken, healthy = Diary(fail=method), Diary()
    told = rf"the observer Diary failed in {method}\(\) and is dropped; .* ZeroDivisionError: out of ink"
    with pytest.warns(RuntimeWarning, match=told) as caught:
        history, value = _fit((broken, healthy))
    assert len(caught) == 1
    assert history.stopped == "finished"
    assert value == _fit(())[1]
    assert healthy.pages[-1][0] == "finish"
    assert [page[0] for page in broken.pages].count(method) == 1


def test_finish_comes_also_where_the_run_fails():
    diary = Diary()
    with pytest.raises(Diverged):
        _fit((diary,), bad=lambda index: True)
    assert diary.pages[-1][0] == "finish"
    assert diary.pages[-1][1].stopped == "failed"


def test_json_lines(tmp_path):
    path = tmp_path / "deep" / "metrics.jsonl"
    _fit((JsonLines(path),), steps=12, validation=0.5, validate_every=6)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(12))
    assert steps[0] == {"step": 0, "loss": 0.0, "extra": 2.0, "grad_norm": 1.0}
    assert [line["step"] for line in lines if "validation" in line] == [5, 11]
    assert lines[-1]["stopped"] == "finished"


def test_json_lines_hold_no_nan(tmp_path):
    log = JsonLines(tmp_path / "x.jsonl")
    log.start(None, 1)
    log.step(0, {"a": math.nan, "b": math.inf, "c": 1.0})
    log.finish(_fit((), steps=1)[0])
    assert (tmp_path / "x.jsonl").read_text().splitlines()[0] == '{"step": 0, "a": null, "b": null, "c": 1.0}'


def test_the_progress_bar_draws_at_most_ten_times_a_second():
    stream = io.StringIO()
    bar = ProgressBar(stream)
    drawn = []
    real = bar._draw
    bar._draw = lambda *args: (drawn.append(args), real(*args))
    history, _ = _fit((bar,), steps=400)
    text = stream.getvalue()
    assert "400/400" in text
    assert "steps/s" in text
    assert "loss" in text
    assert len(drawn) <= 2 + 10 * history.seconds


def test_progress_is_drawn_where_someone_sees_it(monkeypatch, capsys):
    drawn = []
    monkeypatch.setattr("pgen.run.ProgressBar", lambda: drawn.append(1) or Diary())
    for progress, terminal, expected in [
        (None, True, 1),
        (None, False, 0),
        (True, False, 1),
        (False, True, 0),
    ]:
        drawn.clear()
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal, raising=False)
        _fit((), steps=1, progress=progress)
        assert len(drawn) == expected


def test_tensorboard_writes_events(tmp_path):
    pytest.importorskip("tensorboardX", reason="the extra 'tensorboard' is not installed")
    _fit((TensorBoard(tmp_path),))
    (events,) = tmp_path.iterdir()
    assert b"grad_norm" in events.read_bytes()


def test_tensorboard_says_what_to_install(monkeypatch, tmp_path):
    real = builtins.__import__

    def missing(name, *args):
        if name.startswith("tensorboardX"):
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(OptionError, match=r"pip install 'pgen-ppl\[tensorboard\]'"):
        TensorBoard(tmp_path)


def test_they_are_found_by_name():
    assert pgen_observers() == {"jsonl": JsonLines, "progress": ProgressBar, "tensorboard": TensorBoard}
