"""The record of a run: series padded, moved in blocks, cut on roll-back, and the same after a round trip."""

import json
import math

import pytest
import torch

from pgen.errors import CheckpointError, ProgramError, UnknownName
from pgen.history import History, Recorder


def _history(**changes):
    fields = {
        "metrics": {"loss": torch.tensor([3.0, math.nan, 1.0], dtype=torch.float64)},
        "validation": ((1, 4.0), (3, math.inf)),
        "steps": 3,
        "seconds": 1.5,
        "stopped": "early",
        "seed": 7,
        "best": 1,
        "warnings": ("careful",),
    }
    return History(**(fields | changes))


def test_json_round_trip():
    history = _history()
    text = json.dumps(history.to_json(), allow_nan=False)
    for back in (History.from_json(text), History.from_json(json.loads(text))):
        assert torch.equal(back["loss"].nan_to_num(-1), history["loss"].nan_to_num(-1))
        assert back.validation[0] == (1, 4.0)
        assert math.isnan(back.validation[1][1])  # JSON has no infinity
        for name in ("steps", "seconds", "stopped", "seed", "best", "warnings"):
            assert getattr(back, name) == getattr(history, name)


@pytest.mark.parametrize(
    "broken",
    [
        {},
        {"stopped": "exploded"},
        {"metrics": 3},
        {"metrics": {"loss": "abc"}},
        {"validation": [1]},
        {"steps": None},
        "not json",
        "[1]",
    ],
)
def test_nonsense_is_refused(broken):
    given = broken if isinstance(broken, str) or not broken else _history().to_json() | broken
    with pytest.raises(CheckpointError, match="expected a history"):
        History.from_json(given)


def test_names_are_found_with_and_without_their_player():
    history = _history(metrics={"critic.loss": torch.ones(3), "generator.loss": torch.zeros(3)})
    assert history["generator.loss"][0] == 0
    assert history["loss"][0] == 1  # the first player leads
    assert "loss" in history
    assert "elbo" not in history
    with pytest.raises(
        UnknownName, match=r"no metric 'elbo' was recorded; there are critic.loss, generator.loss"
    ):
        history["elbo"]


def test_it_reads_well():
    assert repr(History()) == "History(nothing to train, finished)"
    assert repr(History(stopped="interrupted")) == "History(0 steps, interrupted)"
    assert repr(_history()) == (
        "History(3 steps in 1.5 s (2/s), early; loss 3 -> 1; held-out inf, lowest 4 at step 1; 1 warning)"
    )
    assert len(History()) == 0
    assert History()
    assert _history().steps_per_second == 2.0


def test_a_recorder_pads_what_is_missing():
    recorder = Recorder()
    recorder.add({"loss": torch.tensor(1.0)})
    recorder.add({"loss": torch.tensor([[2.0]]), "late": 5})
    assert recorder.flush() == [{"loss": 1.0}, {"loss": 2.0, "late": 5.0}]
    recorder.add({"late": torch.tensor(6, dtype=torch.int64)})
    recorder.flush()
    series = recorder.tensors()
    assert series["loss"].tolist()[:2] == [1.0, 2.0]
    assert math.isnan(series["loss"][2])
    assert math.isnan(series["late"][0])
    assert series["late"].tolist()[1:] == [5.0, 6.0]
    assert {values.dtype for values in series.values()} == {torch.float64}


def test_a_recorder_moves_a_block_at_once(monkeypatch):
    """One wait for the device per block and dtype, however many steps and metrics."""
    moves = []
    real = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: (moves.append(self.shape), real(self))[1])
    monkeypatch.setattr(torch.Tensor, "item", lambda self: pytest.fail("one wait per step"))
    recorder = Recorder()
    for i in range(50):
        recorder.add({"loss": torch.tensor(float(i)), "norm": torch.tensor(1.0), "count": 3})
    recorder.flush()
    assert moves == [torch.Size([100])]
    assert recorder.flush() == []


def test_a_recorder_forgets_what_is_undone_and_goes_on_from_what_was_saved():
    recorder = Recorder()
    for i in range(5):
        recorder.add({"loss": float(i)})
    recorder.flush()
    recorder.validation = [(2, 1.0), (4, 0.5)]
    recorder.add({"loss": 99.0})
    recorder.truncate(3)
    recorder.flush()
    assert recorder.tensors()["loss"].tolist() == [0.0, 1.0, 2.0]
    assert recorder.validation == [(2, 1.0)]
    other = Recorder()
    other.restore(3, recorder.tensors(), [[2, 1.0]])
    other.add({"loss": 3.0})
    other.flush()
    assert other.tensors()["loss"].tolist() == [0.0, 1.0, 2.0, 3.0]
    assert other.validation == [(2, 1.0)]


def test_a_metric_must_be_one_number():
    recorder = Recorder()
    recorder.add({"weights": torch.ones(3)})
    with pytest.raises(
        ProgramError, match=r"metric 'weights' has shape \(3,\); expected one number per step"
    ):
        recorder.flush()
