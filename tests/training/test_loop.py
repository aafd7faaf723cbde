"""What diverges is undone, what cannot be undone is told, and what was learned is kept."""

import math
import os
import signal
import warnings
from functools import partial

import pytest
import torch

from pgen.errors import Diverged, OptionError, ProgramError
from pgen.run import Player, Run
from tests.training.subjects import mean_player, problem, same, trained

steady = partial(Run, schedule="constant")


def breaking_player(bad):
    """Moves by 1 per step at full rate; `bad(step, calls)` says when the loss is not finite."""
    a, calls = torch.zeros(1, requires_grad=True), []

    def loss(batch, step):
        calls.append(step.index)
        return -a.sum() * (math.nan if bad(step.index, calls) else 1.0), {}

    return Player({"a": a}, loss), calls


def test_what_diverges_is_undone_at_half_the_rate():
    player, _ = breaking_player(lambda index, calls: index == 157 and calls.count(157) == 1)
    with pytest.warns(RuntimeWarning, match="step 157: the loss of player 'p' is nan; went back to step 100"):
        history = steady(steps=200, optimizer="sgd", lr=1.0, compile=False).optimize(
            {"p": player}, problem(10)
        )
    assert player.parameters["a"].item() == 100 + 100 * 0.5
    assert history.steps == len(history["loss"]) == 200
    assert history["loss"].isfinite().all()
    assert len(history.warnings) == 1


def test_the_copy_to_go_back_to_can_be_used_again():
    """Momentum is part of it: twice back to step 100, then on at a quarter of the rate."""
    player, _ = breaking_player(lambda index, calls: index == 157 and calls.count(157) <= 2)
    run = steady(steps=200, optimizer=lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9))
    with pytest.warns(RuntimeWarning, match="went back to step 100 with 0.(5|25) of"):
        run.optimize({"p": player}, problem(10))
    value = velocity = 0.0
    for step in range(200):
        velocity = 0.9 * velocity + 1.0
        value += 0.1 * velocity * (1 if step < 100 else 0.25)
    assert abs(player.parameters["a"].item() - value) < 1e-3


def test_after_three_roll_backs_it_gives_up_with_the_last_good_state():
    player, calls = breaking_player(lambda index, calls: index >= 120)
    run = steady(steps=500, optimizer="sgd", lr=1.0)
    with (
        pytest.warns(RuntimeWarning, match="went back"),
        pytest.raises(
            Diverged, match=r"step 120 of 500: the loss of player 'p' is nan.*parameters of step 100"
        ) as caught,
    ):
        run.optimize({"p": player}, problem(10))
    assert "Run(lr=" in str(caught.value)
    assert player.parameters["a"].item() == 100
    assert calls.count(110) == 4


def test_bad_data_fails_at_the_first_step():
    player, calls = breaking_player(lambda index, calls: True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(Diverged, match="step 0 of 2000.*Nothing was learned yet, so look at the data"):
            steady().optimize({"p": player}, problem(10))
    assert len(calls) == 4
    assert player.parameters["a"].item() == 0


def test_a_gradient_that_is_not_finite_is_noticed_though_the_loss_is():
    a = torch.zeros(1, requires_grad=True)
    player = Player({"a": a}, lambda batch, step: (a.sqrt().sum(), {}))  # infinite slope at 0
    with pytest.raises(Diverged, match="the gradient norm of player 'p' is inf"):
        steady(steps=10).optimize({"p": player}, problem(10))
    assert a.item() == 0


def test_errors_that_come_of_broken_parameters_are_divergence_and_others_are_not():
    a = torch.zeros(1, requires_grad=True)

    def loss(batch, step):
        if not a.isfinite().all():
            raise ValueError("Expected parameter loc to satisfy Real()")
        if step.index == 5:
            with torch.no_grad():
                a.fill_(math.inf)  # as an overflowing update would
        return a.sum(), {}

    with (
        pytest.warns(RuntimeWarning, match="the program raised ValueError: Expected parameter loc|is inf"),
        pytest.raises(Diverged) as caught,
    ):
        steady(steps=20).optimize({"p": Player({"a": a}, loss)}, problem(10))
    assert a.item() == 0
    assert "step" in str(caught.value)

    def typo(batch, step):
        raise ValueError("a typo")

    b = torch.zeros(1, requires_grad=True)
    before = torch.random.get_rng_state()
    with pytest.raises(ValueError, match="^a typo$"):
        steady(steps=20).optimize({"p": Player({"b": b}, typo)}, problem(10))
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_failing_factorisation_is_undone():
    a, calls = torch.zeros(1, requires_grad=True), []

    def loss(batch, step):
        calls.append(step.index)
        if step.index == 7 and calls.count(7) == 1:
            torch.linalg.cholesky(-torch.eye(2))
        return -a.sum(), {}

    with pytest.warns(RuntimeWarning, match="the program raised LinAlgError"):
        history = steady(steps=10).optimize({"p": Player({"a": a}, loss)}, problem(10))
    assert history.steps == 10


def test_buffers_are_undone_with_the_parameters():
    a, count, calls = torch.zeros(1, requires_grad=True), torch.zeros(()), []

    def loss(batch, step):
        count.add_(1)
        calls.append(step.index)
        return -a.sum() * (math.nan if step.index == 15 and calls.count(15) == 1 else 1.0), {}

    with pytest.warns(RuntimeWarning, match="went back to step 0"):
        steady(steps=20).optimize({"p": Player({"a": a}, loss)}, problem(10), buffers={"count": count})
    assert count.item() == 20
    assert len(calls) > 20


@pytest.mark.parametrize("real", [False, True])
def test_ctrl_c_keeps_what_was_learned(real):
    # A shell that runs the tests in the background has them ignore the signal.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def make(stop):
        player = mean_player(noise=0.1)

        def loss(batch, step):
            if step.index == stop:
                if real:
                    os.kill(os.getpid(), signal.SIGINT)
                else:
                    raise KeyboardInterrupt
            return player.loss(batch, step)

        return Player(player.parameters, loss)

    interrupted, whole = make(12), make(None)
    try:
        history = steady(steps=1000).optimize({"p": interrupted}, problem())
    finally:
        signal.signal(signal.SIGINT, before)
    steady(steps=12).optimize({"p": whole}, problem())
    assert (history.stopped, history.steps, len(history["loss"])) == ("interrupted", 12, 12)
    assert same(trained(interrupted), trained(whole))


def test_ctrl_c_never_keeps_what_is_not_finite():
    a = torch.zeros(1, requires_grad=True)

    def loss(batch, step):
        if step.index == 105:
            raise KeyboardInterrupt
        return -a.sum() * (math.nan if step.index > 102 else 1), {}

    history = steady(steps=1000, optimizer="sgd", lr=1.0).optimize({"p": Player({"a": a}, loss)}, problem(10))
    assert (a.item(), history.steps, history.stopped) == (100, 100, "interrupted")


def test_ctrl_c_looks_at_the_parameters_too():
    a = torch.zeros(1, requires_grad=True)

    def loss(batch, step):
        if step.index == 105:
            with torch.no_grad():
                a.fill_(math.inf)
            raise KeyboardInterrupt
        return -a.sum(), {}

    history = steady(steps=1000, optimizer="sgd", lr=1.0).optimize({"p": Player({"a": a}, loss)}, problem(10))
    assert (a.item(), history.steps) == (100, 100)


def test_parameters_that_no_loss_depends_on_are_told():
    player = mean_player()
    spare = torch.zeros(3, requires_grad=True)
    history = steady(steps=3).optimize(
        {"p": Player({**player.parameters, "spare": spare}, player.loss)}, problem()
    )
    assert history.warnings == ("player 'p': no loss depends on 'spare', which keep their values",)
    assert same([spare], [torch.zeros(3)])


def test_parameters_that_cannot_be_trained_are_refused():
    leaf = torch.zeros(1, requires_grad=True)
    nothing = lambda batch, step: (leaf.sum(), {})  # noqa: E731
    for bad, told in [
        ({"a": leaf * 2}, "the result of a computation"),
        ({"a": torch.ones(1, dtype=torch.int64)}, "int64"),
    ]:
        with pytest.raises(ProgramError, match=rf"player 'p': parameter 'a' is .*{told}; expected a leaf"):
            steady().optimize({"p": Player(bad, nothing)}, problem())
    with pytest.raises(ProgramError, match="belongs to the players 'p' and 'q'"):
        steady().optimize({"p": Player({"a": leaf}, nothing), "q": Player({"b": leaf}, nothing)}, problem())
    with pytest.raises(ProgramError, match=r"the loss of player 'p' has shape \(3,\); expected one number"):
        steady().optimize({"p": Player({"a": leaf}, lambda batch, step: (leaf.expand(3), {}))}, problem())
    with pytest.raises(OptionError, match="there is no player 'critic'; expected names among 'p'"):
        steady(lr={"critic": 0.1}).optimize({"p": Player({"a": leaf}, nothing)}, problem())
    with pytest.raises(OptionError, match="the callable gave list; expected a torch.optim.Optimizer"):
        steady(optimizer=list).optimize({"p": Player({"a": leaf}, nothing)}, problem())
