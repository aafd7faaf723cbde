"""A replay does what the loss does: the same numbers, to round-off, or it is not used."""

import os
import random
import re
import signal
import warnings
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import nn

from pgen.algorithms.bounds import warmup
from pgen.errors import Diverged
from pgen.run import Player, Run, Step
from pgen.training.players import evaluate
from pgen.training.replays import Replays
from tests.training.subjects import mean_player, problem, same, trained


class Autoencoder:
    """A network with everything that changes between steps: dropout, batch norm, noise, an annealed term."""

    def __init__(self, dtype=None):
        torch.manual_seed(3)
        # No bias in front of batch norm: its gradient is round-off alone, which Adam makes as large as any other.
        self.net = nn.Sequential(
            nn.Linear(2, 8, bias=False), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Tanh(), nn.Linear(8, 2)
        )
        if dtype is not None:
            self.net.to(dtype)

    def loss(self, batch, step):
        self.net.train(step.training)
        x = batch.inputs["x"]
        found = self.net(x + 0.1 * torch.randn_like(x))
        weight = warmup(step.number, step.steps, 0.5)
        error = (found - x).square().mean()
        return error + weight * found.abs().mean(), {
            "error": error,
            "weight": weight,
            "rows": float(batch.rows),
        }

    def fit(self, run, data=None):
        player = Player(dict(self.net.named_parameters()), self.loss)
        return run.optimize(
            {"net": player}, problem() if data is None else data, buffers=dict(self.net.named_buffers())
        )

    def tensors(self):
        return [t.detach().clone() for t in (*self.net.parameters(), *self.net.buffers())]


def alike(left, right, slack=1e-5):
    """To round-off, as it grows over a few steps."""
    return all(torch.allclose(a, b, rtol=slack, atol=slack) for a, b in zip(left, right, strict=True))


def both(options, fit):
    """What a fit gives as it is written, and by replays."""
    every = {"steps": 40, "lr": 1e-2, "progress": False, **options}
    return [fit(Run(compile=compiled, **every)) for compiled in (False, "auto")]


RUNS = {
    "batches": {"batch_size": 16},
    "all rows": {"batch_size": 1000},
    "batches of two lengths": {"batch_size": 299},
    "bfloat16": {"batch_size": 16, "precision": "bfloat16"},
    "float64": {"batch_size": 16, "precision": "float64"},
    "average and validation": {
        "batch_size": 16,
        "ema": 0.9,
        "validation": 0.2,
        "validate_every": 7,
        "patience": 3,
    },
    "momentum": {"batch_size": 16, "optimizer": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9)},
    "rmsprop": {"batch_size": 16, "optimizer": "rmsprop", "clip_norm": 0.01},
    "adamw": {"batch_size": 16, "optimizer": "adamw", "clip_norm": None},
}


@pytest.mark.parametrize("case", RUNS)
def test_a_fit_gives_the_same(case):
    def fit(run):
        subject = Autoencoder()
        history = subject.fit(run)
        return history, subject.tensors()

    (written, one), (replayed, other) = both(RUNS[case], fit)
    assert replayed.warnings == ()
    assert written.metrics.keys() == replayed.metrics.keys()
    slack = 1e-2 if case == "bfloat16" else 1e-4
    assert alike(
        [written[name] for name in written.metrics], [replayed[name] for name in written.metrics], slack
    )
    assert alike([torch.tensor(written.validation)], [torch.tensor(replayed.validation)], slack)
    assert alike(one, other, slack)


def test_players_that_read_each_others_parameters():
    """One maximises what the other minimises: nobody's parameters are constants."""

    def fit(run):
        a, b = torch.tensor(1.0, requires_grad=True), torch.tensor(2.0, requires_grad=True)
        one = Player({"a": a}, lambda batch, step: (a.exp() * b.exp() + a.square(), {}))
        two = Player(
            {"b": b}, lambda batch, step: (-a.exp() * b.exp() + b.square() * batch.inputs["x"].mean(), {})
        )
        return run.optimize({"a": one, "b": two}, problem()), [a.detach(), b.detach()]

    (written, one), (replayed, other) = both({"batch_size": 16}, fit)
    assert alike(one, other)
    assert replayed.warnings == ()
    assert alike([written["b.loss"]], [replayed["b.loss"]])


def test_a_buffer_that_is_replaced_is_renewed():
    def fit(run):
        loc, buffers = torch.zeros(2, requires_grad=True), {"mean": torch.zeros(2)}

        def loss(batch, step):
            x = batch.inputs["x"]
            buffers["mean"] = 0.9 * buffers["mean"] + 0.1 * x.mean(0)
            return (loc - buffers["mean"]).square().sum(), {}

        history = run.optimize({"p": Player({"loc": loc}, loss)}, problem(), buffers=buffers)
        return history, [loc.detach(), buffers["mean"]]

    (written, one), (replayed, other) = both({"batch_size": 16}, fit)
    assert alike(one, other)
    assert replayed.warnings == ()
    assert alike([written["loss"]], [replayed["loss"]])


def test_a_captured_tensor_that_someone_else_changes_is_read_anew():
    def fit(run):
        loc, heat = torch.zeros(2, requires_grad=True), torch.tensor(1.0)

        class Cool:
            def start(self, run, total): ...

            def step(self, index, metrics):
                heat.mul_(0.9)

            def finish(self, history): ...

        def loss(batch, step):
            return ((loc - batch.inputs["x"]).square() * heat.exp()).mean(), {}

        chilled = Run(**{**vars(run), "observers": (Cool(),)})
        return chilled.optimize({"p": Player({"loc": loc}, loss)}, problem()), [loc.detach()]

    (_, one), (replayed, other) = both({"batch_size": 16}, fit)
    assert alike(one, other)
    assert replayed.warnings == ()


def test_gradients_and_metrics_that_share_memory():
    """Tensors that get one and the same gradient are moved alike, and a view of a parameter is recorded as it was."""

    def fit(run):
        a, b = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)

        def loss(batch, step):
            return 40 * (a + b).square().sum(), {"first": a[0], "sum": (a + b)[0]}

        history = run.optimize({"p": Player({"a": a, "b": b}, loss)}, problem())
        return history, [a.detach(), b.detach()]

    (written, one), (replayed, other) = both(
        {"optimizer": "sgd", "clip_norm": 0.1, "schedule": "constant"}, fit
    )
    assert alike(one, other)
    assert torch.equal(one[0], one[1])
    assert alike([written["first"]], [replayed["first"]])
    # Each step is 0.1 long in all, half of it squared for either tensor: a gradient is shortened once.
    assert torch.allclose(
        written["first"][:2].diff(), torch.tensor(-0.01 * 0.1 / 6**0.5, dtype=torch.float64), rtol=1e-3
    )


def test_a_parameter_that_no_loss_depends_on():
    def fit(run):
        a, idle = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
        player = Player({"a": a, "idle": idle}, lambda batch, step: (a.square().sum(), {}))
        return run.optimize({"p": player}, problem()), [a.detach(), idle.detach()]

    (written, one), (replayed, other) = both({}, fit)
    assert alike(one, other)
    assert written.warnings == replayed.warnings
    assert "no loss depends on 'idle'" in replayed.warnings[0]


# --- what cannot be replayed --------------------------------------------------------------------------------


def odd(kind):
    """Losses that torch does not see all of."""
    loc, kept = torch.zeros(2, requires_grad=True), {"calls": 0, "history": [], "hidden": torch.zeros(())}
    source = np.random.default_rng(1)

    def loss(batch, step):
        error = (loc - batch.inputs["x"]).square().mean()
        if kind == "value" and error > 0.5:
            error = 2 * error
        elif kind == "item":
            error = error * min(error.item(), 2.0)
        elif kind == "index":
            error = error * (1 + step.index / step.steps)
        elif kind == "counter":
            kept["calls"] += 1
            error = error * (2 if kept["calls"] > 30 else 1)
        elif kind == "list":
            kept["history"].append(1)
            error = error * (2 if len(kept["history"]) > 30 else 1)
        elif kind == "random":
            error = error * (1 + random.random())
        elif kind == "numpy":
            error = error * (1 + np.random.rand())  # noqa: NPY002
        elif kind == "generator":
            error = error * (1 + source.random())
        elif kind == "hidden":
            kept["hidden"] = kept["hidden"] + 1.0
            error = error * (1 + kept["hidden"])
        elif kind == "metric":
            kept["calls"] += 1
            return error, {"calls": float(kept["calls"])}
        return error, {}

    return Player({"loc": loc}, loss)


TOLD = {
    "value": r"aten.* at .*test_replays.py:\d+: if kind == \"value\"|\.item\(\) at .*test_replays.py:\d+: if kind",
    "item": r"\.item\(\) at .*test_replays.py:\d+: error = error \* min",
    "index": "step.number",
    "counter": "it changes kept.calls",
    "list": r"it changes len\(kept.history\)",
    "random": "random numbers of Python's|the state of random",
    "numpy": "random numbers of Python's|the state of numpy",
    "generator": "at step 2 a replay gave the loss",
    "hidden": "at step 2 a replay gave the loss",
    "metric": "it changes kept.calls",
}


@pytest.mark.parametrize("kind", TOLD)
def test_what_torch_does_not_see_is_run_as_written(kind):
    results = []
    for compiled in (False, "auto"):
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        player = odd(kind)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            history = Run(steps=60, batch_size=16, compile=compiled).optimize({"p": player}, problem())
        results.append((history, trained(player)))
    (written, one), (replayed, other) = results
    assert written.warnings == ()
    (told,) = replayed.warnings
    assert told.startswith("player 'p' was run as written")
    assert re.search(TOLD[kind], told), told
    if kind not in (
        "random",
        "numpy",
        "generator",
        "hidden",
    ):  # their state moved on while they were looked at
        assert alike(one, other)
        assert alike([written["loss"]], [replayed["loss"]])


def test_a_loss_can_ask_not_to_be_replayed():
    loc = torch.zeros(2, requires_grad=True)

    def loss(batch, step):
        step.as_written("looks at the clock")
        return (loc - batch.inputs["x"]).square().mean(), {}

    history = Run(steps=30).optimize({"p": Player({"loc": loc}, loss)}, problem())
    assert history.warnings == (
        "player 'p' was run as written, which is slower than replays: it looks at the clock",
    )


def test_a_late_change_is_noticed_at_the_next_power_of_two():
    """A switch that nothing announces: the replays between it and the next comparison are wrong, and it is said so."""

    class Hidden:
        __slots__ = ("calls",)  # neither an attribute in a dict nor a closure

    loc, hidden = torch.zeros(2, requires_grad=True), Hidden()
    hidden.calls = 0

    def loss(batch, step):
        hidden.calls += 1
        return (loc - batch.inputs["x"]).square().mean() * (1 if hidden.calls < 8 else 3), {}

    with pytest.warns(
        RuntimeWarning, match=r"replay gave the loss .* so may the \d+ steps before have gone wrong"
    ):
        history = Run(steps=200, batch_size=16).optimize({"p": Player({"loc": loc}, loss)}, problem())
    assert "was run as written" in history.warnings[0]


def test_an_error_of_the_program_is_the_programs():
    loc = torch.zeros(2, requires_grad=True)

    def loss(batch, step):
        if not step.first:
            raise ValueError("no second step")
        return loc.sum(), {}

    with pytest.raises(ValueError, match="no second step"):
        Run(steps=30).optimize({"p": Player({"loc": loc}, loss)}, problem())


def test_too_many_shapes_are_run_as_written():
    loc = torch.zeros(2, requires_grad=True)
    player = Player({"loc": loc}, lambda batch, step: ((loc - batch.inputs["x"]).square().mean(), {}))
    replays = Replays("p", player, [loc], {})
    for rows in range(2, 20):
        batch = problem(rows)
        found = replays(batch, Step(1, 1000), nullcontext)
        expected = evaluate("p", player, batch, Step(1, 1000), nullcontext())
        assert alike([found.loss, *found.gradients], [expected.loss, *expected.gradients])
    assert "more than 8 shapes" in replays.obstacle


def test_a_factor_that_fails_to_exist_is_an_error_in_a_replay_too():
    """Cholesky factors of matrices that are not positive definite hold no NaN: the error must come through."""
    a = torch.tensor(1.0, requires_grad=True)
    player = Player({"a": a}, lambda batch, step: (torch.linalg.cholesky(a * torch.eye(2)).sum(), {}))
    run = Run(steps=400, lr=0.01, optimizer="sgd", schedule="constant")
    with (
        pytest.warns(RuntimeWarning, match="the program raised LinAlgError"),
        pytest.raises(Diverged, match="LinAlgError"),
    ):
        run.optimize({"p": player}, problem(10))


# --- what a replay leaves alone -----------------------------------------------------------------------------


def test_random_states_are_those_of_the_program():
    """What is drawn after an evaluation is the same, whichever way it was made."""
    drawn = []
    for fast in (False, True):
        subject = Autoencoder()
        player = Player(dict(subject.net.named_parameters()), subject.loss)
        replays = Replays("p", player, list(player.parameters.values()), dict(subject.net.named_buffers()))
        torch.manual_seed(7)
        row = []
        for index in range(1, 20):
            step, batch = Step(index, 1000), problem(10)
            found = (
                replays(batch, step, nullcontext)
                if fast
                else evaluate("p", player, batch, step, nullcontext())
            )
            row += [found.loss, torch.rand(3)]
        assert replays.obstacle is None
        drawn.append(row)
    assert alike(*drawn)


def test_a_run_that_was_killed_goes_on_as_if_it_had_not_been(tmp_path):
    options = {"steps": 40, "batch_size": 16, "lr": 1e-2, "checkpoint_every": 5, "ema": 0.9}
    whole, broken = Autoencoder(), Autoencoder()
    expected = whole.fit(Run(directory=tmp_path / "a", **options))
    kill = {"at": 17}

    class Killer:
        def start(self, run, total): ...

        def step(self, index, metrics):
            if index == kill["at"]:
                os.kill(os.getpid(), signal.SIGINT)

        def finish(self, history): ...

    broken.fit(Run(directory=tmp_path / "b", observers=(Killer(),), **options))
    kill["at"] = -1
    again = Autoencoder()
    history = again.fit(Run(directory=tmp_path / "b", **options))
    assert same(whole.tensors(), again.tensors())
    assert torch.equal(expected["loss"], history["loss"])


def test_threads_are_one_for_small_tensors_and_as_before_afterwards(monkeypatch):
    seen = []
    torch.set_num_threads(2)  # the fixture of these tests puts it back
    monkeypatch.setattr(
        "pgen.training.learner.Adam.step", lambda self, gradients: seen.append(torch.get_num_threads())
    )
    Run(steps=5, batch_size=16).optimize({"p": mean_player()}, problem())
    assert seen == [2, 1, 1, 1, 1]
    assert torch.get_num_threads() == 2
