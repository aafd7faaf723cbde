"""A run: its options, what it learns, and that its seed determines every number."""

import math

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from pgen.errors import DataError, OptionError
from pgen.problem import Problem
from pgen.run import Player, Run
from pgen.training.options import EXPECTED
from tests.training.subjects import mean_player, problem, program, same, trained

# --- options ------------------------------------------------------------------------------------------------


BAD = {
    "steps": [-1, 2.5, True, "10"],
    "batch_size": [0, -3, 1.5],
    "optimizer": ["adan", None, 3],
    "lr": [0, -1e-3, math.nan, math.inf, "fast", {}, {"critic": -1}, {1: 0.1}],
    "schedule": ["cosin", None, 0.5],
    "warmup_steps": [-1, None, 1.5],
    "clip_norm": [0, -1.0, "no"],
    "weight_decay": [-0.1, math.nan],
    "ema": [0, -0.9, math.inf, "power", "power:0.5", "half:3"],
    "validation": [0.0, 1.0, 1.5, 3, True, "10%"],
    "validate_every": [0, 2.5],
    "patience": [0, -1],
    "device": ["gpu please", 0, 3.5, "meta", "cuda:99", "xpu:99"],
    "precision": ["float16", torch.float64, 32],
    "checkpoint_every": [0, 1.5],
    "directory": [3, ""],
    "progress": [1, "yes"],
    "observers": [None, (object(),), print],
    "seed": [-1, 1.5, None],
    "devices": [0, 99, True, "all", (), ("cpu", "cuda:99"), ("cpu", 0)],
    "nodes": [2],
    "strategy": ["ddp"],
    "compile": [True, "jit"],
}


def test_every_option_is_checked():
    assert BAD.keys() == EXPECTED.keys() == Run.__dataclass_fields__.keys()


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in BAD.items() for value in values]
)
def test_a_bad_option_is_named_with_what_was_given_and_expected(name, value):
    with pytest.raises(OptionError, match=rf"Run\({name}=.*\): expected ") as caught:
        Run(**{name: value})
    assert repr(value) in str(caught.value) or "<" in str(caught.value)


def test_options_that_need_each_other():
    with pytest.raises(OptionError, match=r"Run\(patience=...\): expected validation too"):
        Run(patience=3)
    with pytest.raises(OptionError, match=r"Run\(checkpoint_every=...\): expected directory too"):
        Run(checkpoint_every=3)
    with pytest.raises(OptionError, match="beside an optimizer of your own"):
        Run(optimizer=torch.optim.SGD, weight_decay=0.1)


def test_a_mapping_of_options_suggests_the_name_that_was_meant():
    assert Run.of({"steps": 3, "lr": 0.1}) == Run(steps=3, lr=0.1)
    with pytest.raises(OptionError, match=r"Run has no option 'batchsize'; did you mean 'batch_size'\?"):
        Run.of({"batchsize": 3})
    with pytest.raises(OptionError, match="there are steps, batch_size"):
        Run.of({"zzzz": 3})


def test_it_shows_what_differs_from_the_defaults():
    assert repr(Run()) == "Run()"
    assert (
        repr(Run(steps=5, lr=0.1, validation=torch.ones(3)))
        == "Run(steps=5, lr=0.1, validation=<tensor of shape (3,)>)"
    )
    described = Run(
        lr={"a": 1}, optimizer=torch.optim.SGD, validation={"x": torch.ones(3)}, device="cpu"
    ).described()
    assert described["lr"] == {"a": 1.0}
    assert (described["optimizer"], described["validation"], described["device"]) == ("SGD", "dict", "cpu")


# --- learning -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "optimizer",
    ["adam", "adamw", "sgd", "rmsprop", lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.5)],
)
def test_every_optimizer_finds_the_mean(optimizer):
    whole, player = problem(), mean_player(start=3.0)
    lr = None if callable(optimizer) else 0.05
    run = Run(steps=400, batch_size=300, lr=lr, optimizer=optimizer, weight_decay=None if lr is None else 0.0)
    history = run.optimize({"program": player}, whole)
    assert torch.allclose(player.parameters["loc"], whole.inputs["x"].mean(0), atol=0.03)
    assert history.stopped == "finished"
    assert len(history) == history.steps == len(history["loss"]) == 400
    assert history["loss"][-1] < history["loss"][0]
    assert history["rows"].unique().tolist() == [300.0]
    assert history.seconds > 0
    assert history.warnings == ()
    assert player.parameters["loc"].grad is None


def test_metrics_are_those_of_their_step_though_the_tensor_goes_on_changing():
    player = mean_player(start=3.0)
    history = Run(steps=30, optimizer="sgd", lr=0.1).optimize({"program": player}, problem(100))
    assert history["first"][0] == 3.0
    assert len(history["first"].unique()) == 30


def test_defaults_come_from_the_backend_then_the_data_then_the_run():
    x = torch.randn(50, 2)
    loaded = Problem.of(program, DataLoader(TensorDataset(x), batch_size=7))
    history = Run().optimize({"program": mean_player()}, loaded, default_steps=3, default_batch=11)
    assert history["rows"].tolist() == [7.0] * 3
    history = Run().optimize(
        {"program": mean_player()}, Problem.of(program, {"x": x}), default_steps=3, default_batch=11
    )
    assert history["rows"].tolist() == [11.0] * 3
    history = Run(steps=2, batch_size=5).optimize({"program": mean_player()}, loaded)
    assert history["rows"].tolist() == [5.0] * 2


def test_nothing_to_train_returns_at_once():
    history = Run(seed=4).optimize({"program": Player({}, None)}, problem())
    assert (history.steps, history.stopped, history.seed) == (0, "finished", 4)
    assert Run().optimize({}, problem()).steps == 0
    player = mean_player(start=2.0)
    history = Run(steps=0, ema=0.9, validation=0.1).optimize({"program": player}, problem())
    assert (history.steps, len(history.metrics)) == (0, 0)
    assert player.parameters["loc"].tolist() == [2.0, 2.0]


def test_a_problem_without_rows():
    loc = torch.tensor(3.0, requires_grad=True)
    player = Player({"loc": loc}, lambda batch, step: (loc.square(), {}))
    history = Run(steps=200, lr=0.1).optimize({"program": player}, Problem.of(lambda: None, None))
    assert abs(loc.item()) < 0.05
    assert history.steps == 200
    with pytest.raises(OptionError, match="the data has no rows, so none can be held out"):
        Run(validation=0.5).optimize({"program": player}, Problem.of(lambda: None, None))


def test_players_move_only_their_own_parameters_and_see_those_who_moved_before():
    a, b = torch.tensor(1.0, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    players = {
        "min": Player({"a": a}, lambda batch, step: (a * b, {"product": a * b})),
        "max": Player({"b": b}, lambda batch, step: (-a * b, {})),
    }
    run = Run(steps=3, optimizer="sgd", lr={"min": 0.1, "max": 0.5}, schedule="constant", clip_norm=None)
    history = run.optimize(players, problem(10))
    x, y, products = 1.0, 2.0, []
    for _ in range(3):
        products.append(x * y)
        x = x - 0.1 * y
        y = y + 0.5 * x
    assert torch.allclose(torch.stack([a, b]), torch.tensor([x, y]))
    assert torch.allclose(history["min.product"], torch.tensor(products).double())
    assert set(history.metrics) == {"min.loss", "min.grad_norm", "min.product", "max.loss", "max.grad_norm"}
    assert torch.equal(history["loss"], history["min.loss"])


def test_a_player_may_sit_steps_out():
    a = torch.tensor(1.0, requires_grad=True)
    loss = lambda batch, step: (a.square() if step.index % 2 else torch.tensor(0.0), {})  # noqa: E731
    history = Run(steps=6, compile=False).optimize({"a": Player({"a": a}, loss)}, problem(10))
    assert history["grad_norm"].isnan().tolist() == [True, False] * 3
    assert history.warnings == ()


def test_clipping_bounds_the_norm_over_all_parameters_of_a_player():
    a, b = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    player = Player({"a": a, "b": b}, lambda batch, step: (300 * a.sum() + 400 * b.sum(), {}))
    history = Run(steps=1, optimizer="sgd", lr=1.0, clip_norm=5.0).optimize({"p": player}, problem(10))
    assert torch.allclose(torch.cat([a, b]), torch.tensor([-3.0, -4.0]), atol=1e-4)
    assert history["grad_norm"].item() == 500.0


def test_schedules_scale_the_rate_of_every_group():
    taken = {}
    for schedule in ("constant", "linear", "cosine", "exponential", lambda step, steps: 0.5):
        a = torch.zeros(1, requires_grad=True)
        player = Player({"a": a}, lambda batch, step: (-a.sum(), {"a": a}))  # noqa: B023
        run = Run(steps=8, optimizer="sgd", lr=1.0, schedule=schedule, warmup_steps=2)
        history = run.optimize({"p": player}, problem(10))
        taken[schedule if isinstance(schedule, str) else "own"] = torch.cat([history["a"], a.double()]).diff()
    for moves in taken.values():
        assert torch.allclose(moves[:2], moves.new_tensor([0.5, 1.0]) * (0.5 if moves[1] == 0.5 else 1))
    assert torch.allclose(taken["linear"][2:], torch.tensor([6, 5, 4, 3, 2, 1]).double() / 6)
    assert torch.allclose(taken["cosine"][5], torch.tensor(0.5).double())
    assert torch.allclose(taken["exponential"][5], torch.tensor(0.1).double())
    assert torch.allclose(taken["own"], torch.tensor([0.25] + [0.5] * 7).double())


def test_the_average_is_what_is_kept():
    values = []
    a = torch.zeros(1, requires_grad=True)
    player = Player({"a": a}, lambda batch, step: (-a.sum(), {"a": a}))
    Run(steps=20, optimizer="sgd", lr=1.0, schedule="constant", ema=0.8).optimize({"p": player}, problem(10))
    average = 0.0
    for t in range(1, 21):
        decay = min(0.8, (1 + t) / (10 + t))
        average = decay * average + (1 - decay) * t
        values.append(average)
    assert abs(a.item() - average) < 1e-4
    by_half_life = torch.zeros(1, requires_grad=True)
    player = Player({"a": by_half_life}, lambda batch, step: (-by_half_life.sum(), {}))
    run = Run(steps=20, optimizer="sgd", lr=1.0, schedule="constant", ema=math.log(0.5) / math.log(0.8))
    run.optimize({"p": player}, problem(10))
    assert torch.allclose(a, by_half_life, atol=1e-4)


def test_an_average_may_remember_a_share_of_the_training():
    """Of a tensor that grows by one a step: t (g + 1) / (g + 2), where (g + 1) / (g + 2)^2 (g + 3) = 0.1^2."""
    a = torch.zeros(1, requires_grad=True)
    player = Player({"a": a}, lambda batch, step: (-a.sum(), {}))
    Run(steps=400, optimizer="sgd", lr=1.0, schedule="constant", ema="power:0.1").optimize(
        {"p": player}, problem(10)
    )
    g = 6.937
    assert abs((g + 1) / ((g + 2) ** 2 * (g + 3)) - 0.01) < 1e-5
    assert abs(a.item() / 400 - (g + 1) / (g + 2)) < 0.005


# --- random numbers -----------------------------------------------------------------------------------------


def test_the_seed_determines_everything_and_the_world_is_left_alone():
    results = []
    for seed, world in [(0, 1), (0, 2), (5, 1)]:
        torch.manual_seed(world)
        player = mean_player(noise=1.0)
        before = torch.random.get_rng_state()
        Run(steps=25, batch_size=16, seed=seed, validation=0.2).optimize({"p": player}, problem())
        assert torch.equal(torch.random.get_rng_state(), before)
        results.append(trained(player))
    assert same(results[0], results[1])
    assert not same(results[0], results[2])


def test_every_step_draws_numbers_of_its_own():
    a = torch.zeros(1, requires_grad=True)
    player = Player({"a": a}, lambda batch, step: (a.sum(), {"draw": torch.randn(())}))
    history = Run(steps=50).optimize({"p": player}, problem(10))
    assert len(history["draw"].unique()) == 50


def test_looking_changes_no_buffer():
    counts = []
    for options in ({}, {"validation": {"x": torch.randn(300, 2)}, "validate_every": 5}):
        a, count = torch.zeros(1, requires_grad=True), torch.zeros(())
        player = Player({"a": a}, lambda batch, step: (a.sum() * count.add_(1).detach(), {}))  # noqa: B023
        Run(steps=20, **options).optimize({"p": player}, problem(10), buffers={"count": count})
        counts.append(count.item())
    assert counts == [20, 20]


def test_looking_changes_nothing():
    """Validation, observers and checkpoints draw no random number of a step, and change no parameter."""
    results = []
    held = {"x": torch.randn(9, 2)}
    for options in ({}, {"validation": held, "validate_every": 3}, {"validation": held, "validate_every": 7}):
        player = mean_player(noise=1.0)
        Run(steps=25, batch_size=16, **options).optimize({"p": player}, problem())
        results.append(trained(player))
    assert same(results[0], results[1])
    assert same(results[0], results[2])


def test_no_step_waits_for_the_device(monkeypatch):
    waits = []
    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "numpy"):
        real = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda self, *a, _real=real: (waits.append(1), _real(self, *a))[1]
        )
    monkeypatch.setattr("pgen.training.loop.CHECK_SECONDS", 1e9)
    counts = []
    for steps in (200, 400):
        waits.clear()
        Run(steps=steps, batch_size=16, lr=1e-3, clip_norm=None).optimize({"p": mean_player()}, problem())
        counts.append(len(waits))
    # A block of metrics every 10 steps, a copy and a look at the parameters every 100, and one comparison more.
    assert counts[1] - counts[0] <= 200 // 10 + 5


# --- held-out data ------------------------------------------------------------------------------------------


def test_held_out_rows_are_not_learned_from():
    x = torch.arange(40.0).unsqueeze(-1)
    seen = {True: set(), False: set()}
    weight = torch.zeros(1, requires_grad=True)

    def loss(batch, step):
        seen[step.training].update(batch.inputs["x"].flatten().tolist())
        assert batch.total == 30  # what a batch stands for: the rows that are learned from
        return (weight * batch.inputs["x"]).mean(), {}

    run = Run(steps=20, batch_size=8, validation=0.25, validate_every=10)
    history = run.optimize({"p": Player({"w": weight}, loss)}, Problem.of(program, {"x": x}))
    assert (len(seen[True]), len(seen[False])) == (30, 10)
    assert not seen[True] & seen[False]
    assert [step for step, _ in history.validation] == [10, 20]


def test_held_out_losses_are_means_over_rows_whatever_the_batches():
    held = torch.arange(10.0).unsqueeze(-1)
    weight = torch.ones(1, requires_grad=True)
    player = Player(
        {"w": weight},
        lambda batch, step: ((weight.detach() * batch.inputs["x"]).mean() + 0 * weight.sum(), {}),
    )
    run = Run(steps=4, batch_size=4, validation={"x": held}, validate_every=4)
    history = run.optimize({"p": player}, Problem.of(program, {"x": torch.randn(8, 1)}))
    assert history.validation == ((4, 4.5),)


@pytest.mark.parametrize("ema", [None, 0.5])
def test_early_stopping_keeps_the_best_parameters(ema):
    """The loss keeps falling on the data, but the held-out loss has its minimum near 1."""
    a = torch.zeros(1, requires_grad=True)
    loss = lambda batch, step: (-a.sum() if step.training else (a - 1).square().sum(), {})  # noqa: E731
    run = Run(steps=500, optimizer="sgd", lr=0.1, validation=0.5, validate_every=2, patience=4, ema=ema)
    history = run.optimize({"p": Player({"a": a}, loss)}, problem(10))
    assert history.stopped == "early"
    assert history.best is not None
    assert history.steps == history.best + 8
    lowest = min(value for _, value in history.validation)
    assert abs((a - 1).square().item() - lowest) < 1e-6
    assert abs(a.item() - 1) <= 0.11


def test_the_data_of_validation_must_meet_the_program():
    with pytest.raises(DataError):
        Run(validation={"x": torch.zeros(0, 2)}).optimize({"p": mean_player()}, problem())


# --- devices and precision ----------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="tells what happens without CUDA")
def test_a_device_that_is_not_there_is_told():
    with pytest.raises(OptionError, match=r"Run\(device='cuda'\): expected a device of this machine"):
        Run(device="cuda")
    player = mean_player()
    Run(device="cpu", steps=1).optimize({"p": player}, problem())
    Run(device=torch.device("cpu"), steps=1).optimize({"p": player}, problem())


def test_precision():
    seen = []

    def spy(player):
        def loss(batch, step):
            seen.append(
                (batch.inputs["x"].dtype, torch.get_default_dtype(), torch.is_autocast_enabled("cpu"))
            )
            return player.loss(batch, step)

        return Player(player.parameters, loss)

    for precision in ("float32", "float64", "bfloat16", None):
        player = mean_player()
        Run(steps=2, precision=precision).optimize({"p": spy(player)}, problem())
        seen.append(player.parameters["loc"].dtype)
    f32, f64 = torch.float32, torch.float64
    assert seen[2] == seen[8] == seen[11] == f32
    assert seen[5] == f64
    assert (seen[0], seen[3], seen[6], seen[9]) == (
        (f32, f32, False),
        (f64, f64, False),
        (f32, f32, True),
        (f32, f32, False),
    )
    assert torch.get_default_dtype() == f32
