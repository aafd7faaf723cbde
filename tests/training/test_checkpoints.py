"""A run that was killed goes on from its checkpoints as if it had not been, to the bit."""

import errno
import math
import multiprocessing
import os
import signal
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from pgen.errors import CheckpointError
from pgen.history import History
from pgen.run import Player, Run, Step
from tests.training.subjects import mean_player, problem, same, trained


class Network:
    """Everything that a run must remember: dropout, batch-norm statistics, two players, two optimisers."""

    def __init__(self, poison=None, kill=None):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(
                nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 2)
            )
            self.scale = torch.zeros(2, requires_grad=True)
        self.poison, self.kill, self.calls = poison, kill, []

    def loss(self, batch, step):
        self.calls.append(step.index)
        if step.training and step.index == self.kill:
            raise SystemExit("killed")
        self.net.train(step.training)
        x = batch.inputs["x"]
        factor = math.nan if step.index == self.poison and self.calls.count(self.poison) == 1 else 1.0
        return factor * (self.net(x) - x * self.scale.detach().exp()).square().mean(), {
            "scale": self.scale[0]
        }

    def second(self, batch, step):
        return (self.scale - torch.randn(2)).square().sum(), {}

    def fit(self, run):
        players = {
            "net": Player(dict(self.net.named_parameters()), self.loss),
            "scale": Player({"scale": self.scale}, self.second),
        }
        return run.optimize(players, problem(100), buffers=dict(self.net.named_buffers()))

    def tensors(self):
        return [*trained(Player(self.net.state_dict(), None)), self.scale.detach().clone()]


OPTIONS = {
    "adam": {"schedule": "cosine", "warmup_steps": 5},
    "plain": {"optimizer": "sgd", "lr": 0.05},
    "momentum": {"optimizer": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9, nesterov=True)},
    "rmsprop": {"optimizer": "rmsprop", "clip_norm": None},
    "average": {"optimizer": "adamw", "ema": 0.9, "validation": 0.2, "validate_every": 6},
    "patience": {"validation": 0.2, "validate_every": 3, "patience": 50, "ema": 5},
    "amsgrad": {"optimizer": lambda params: torch.optim.Adam(params, lr=0.01, amsgrad=True)},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_forty_steps_are_seventeen_and_a_kill_and_the_rest(tmp_path, options):
    def run(place):
        return Run(steps=40, batch_size=16, directory=tmp_path / place, checkpoint_every=5, seed=3, **options)

    whole = Network()
    expected = whole.fit(run("whole"))
    killed = Network(kill=17)
    with pytest.raises(SystemExit):
        killed.fit(run("other"))
    resumed = Network()
    history = resumed.fit(run("other"))
    assert min(resumed.calls) == 15
    assert same(whole.tensors(), resumed.tensors())
    assert history.validation == expected.validation
    assert (history.steps, history.best) == (40, expected.best)
    for name, series in expected.metrics.items():
        assert torch.equal(history[name], series)
    again = Network()
    assert again.fit(run("other")).steps == 40  # nothing left to do: the result is there at once
    assert again.calls == []
    assert same(whole.tensors(), again.tensors())


def test_roll_backs_are_remembered(tmp_path):
    run = lambda place: Run(steps=40, batch_size=16, directory=tmp_path / place, checkpoint_every=5)  # noqa: E731
    whole, killed, resumed = Network(poison=12), Network(poison=12, kill=23), Network()
    with pytest.warns(RuntimeWarning, match="step 12.*went back to step 10 with 0.5"):
        expected = whole.fit(run("whole"))
    with pytest.warns(RuntimeWarning, match="went back"), pytest.raises(SystemExit):
        killed.fit(run("other"))
    history = resumed.fit(run("other"))
    assert same(whole.tensors(), resumed.tensors())
    assert history.warnings == expected.warnings


def _fit_and_die(directory):
    Network().fit(
        Run(steps=40, batch_size=16, directory=directory, checkpoint_every=2, observers=(Suicide(25),))
    )


class Suicide:
    def __init__(self, at):
        self.at = at

    def start(self, run, total):
        pass

    def step(self, index, metrics):
        if index >= self.at:
            os.kill(os.getpid(), signal.SIGKILL)

    def finish(self, history):
        pass


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*:DeprecationWarning")
def test_a_killed_process_is_gone_on_from(tmp_path):
    child = multiprocessing.get_context("fork").Process(target=_fit_and_die, args=(tmp_path / "a",))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    whole, resumed = Network(), Network()
    whole.fit(Run(steps=40, batch_size=16, directory=tmp_path / "b", checkpoint_every=2))
    resumed.fit(Run(steps=40, batch_size=16, directory=tmp_path / "a", checkpoint_every=2))
    assert min(resumed.calls) > 20
    assert same(whole.tensors(), resumed.tensors())


def test_more_steps_go_on_from_fewer(tmp_path):
    for steps in (10, 25):
        last = Network()
        last.fit(Run(steps=steps, schedule="constant", directory=tmp_path / "a", checkpoint_every=10))
    assert last.calls[0] == 10
    whole = Network()
    whole.fit(Run(steps=25, schedule="constant", directory=tmp_path / "b", checkpoint_every=10))
    assert same(whole.tensors(), last.tensors())
    with pytest.raises(CheckpointError, match="it is at step 25, and this run has only 20 steps"):
        Network().fit(Run(steps=20, schedule="constant", directory=tmp_path / "a", checkpoint_every=10))


def test_damaged_checkpoints_are_passed_over(tmp_path):
    run = Run(steps=20, directory=tmp_path, checkpoint_every=5)
    whole = Network()
    whole.fit(run)
    folder = tmp_path / "checkpoints" / "training"
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000015", "step-00000020"]
    file = folder / "step-00000020" / "tensors.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    again = Network()
    with pytest.warns(RuntimeWarning, match="skipped a damaged checkpoint, going on from step-00000015"):
        again.fit(run)
    assert again.calls[0] == 15
    assert same(whole.tensors(), again.tensors())
    for path in folder.iterdir():
        (path / "manifest.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"no checkpoint in .* can be read; remove it to start anew.*missing"
    ):
        Network().fit(run)


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    Network().fit(Run(steps=5, directory=tmp_path, checkpoint_every=5))
    for options, told in [
        ({"seed": 1}, "a run with seed = 0, but this run has 1"),
        ({"lr": 0.5}, "with lr = None, but this run has 0.5"),
        ({"batch_size": 3}, "with batch_size = 128, but this run has 3"),
        ({"optimizer": "sgd"}, "'adam', but this run has 'sgd'"),
    ]:
        with pytest.raises(CheckpointError, match=told):
            Network().fit(Run(steps=5, directory=tmp_path, checkpoint_every=5, **options))
    player = mean_player()
    run = Run(steps=5, directory=tmp_path, checkpoint_every=5)
    with pytest.raises(CheckpointError, match="the newest checkpoint is not one of this run"):
        run.optimize({"net": player}, problem(100))
    assert same(trained(player), [torch.zeros(2)])
    run.optimize({"net": player}, problem(100), name="another")  # a training of its own
    assert run.optimize({"net": mean_player()}, problem(100), name="another").steps == 5


def test_a_full_disk_costs_the_checkpoint_but_not_the_run(tmp_path, monkeypatch):
    run = Run(steps=20, directory=tmp_path / "a", checkpoint_every=5, compile=False)
    whole, other = Network(), Network()
    whole.fit(run)
    real = os.rename

    def full(source, target):
        if target.name == "step-00000010":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(source, target)

    monkeypatch.setattr(os, "rename", full)
    told = r"step 10: went on without a checkpoint. .*No space left on device \(ENOSPC\)"
    with pytest.warns(RuntimeWarning, match=told):
        history = other.fit(replace(run, directory=tmp_path / "b"))
    assert len(history.warnings) == 1
    assert same(whole.tensors(), other.tensors())
    folder = tmp_path / "b" / "checkpoints" / "training"
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000015", "step-00000020"]


def test_state_that_only_pickle_could_save_is_refused(tmp_path):
    class Odd(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            self.state["odd"]["thing"] = object()

        def state_dict(self):
            return {"state": {0: {"thing": object()}}, "param_groups": super().state_dict()["param_groups"]}

    run = Run(steps=5, directory=tmp_path, checkpoint_every=5, optimizer=lambda params: Odd(params, lr=0.1))
    with pytest.raises(
        CheckpointError, match=r"state/players/p/optimizer/state/0/thing is object, which cannot be saved"
    ):
        run.optimize({"p": mean_player()}, problem())


def test_the_history_can_be_told_apart():
    history = Run(steps=30, seed=9).optimize({"p": mean_player()}, problem())
    assert isinstance(history, History)
    assert history.seed == 9
    assert "30 steps" in repr(history)
    assert Step(3, 10).training


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_gradients_of_another_memory_layout_are_paired_with_their_parameters(optimizer):
    """A convolution over channels-last images gives such gradients, and torch's fused Adam misreads them."""
    slope = torch.arange(4 * 2 * 3 * 3.0).view(4, 2, 3, 3) - 30
    other = slope.contiguous(memory_format=torch.channels_last)
    ends = []
    for weights in (slope, other):
        tensor = torch.zeros(4, 2, 3, 3).requires_grad_()

        def loss(batch, step, weights=weights, tensor=tensor):
            return (step.index + 1) * (weights * tensor).sum(), {}

        player = Player({"w": tensor}, loss)
        Run(steps=3, optimizer=optimizer, lr=0.1, progress=False).optimize({"p": player}, problem())
        ends.append(tensor.detach())
    assert torch.equal(*ends)
