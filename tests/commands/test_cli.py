"""The command line: what words mean, what comes out, and the text of every error."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from pgen.capability import Exactness
from pgen.cli import main
from pgen.commands.inputs import data_of, program_of
from pgen.commands.options import pairs, plain, typed
from pgen.errors import DataError, OptionError, ProgramError, UnknownName
from pgen.run import Run
from pgen.zoo.data import Data

COIN = """
import pyro, pyro.distributions as dist, torch
def coin(n, heads=2.0):
    p = pyro.sample("p", dist.Beta(heads, 2.0))
    with pyro.plate("data", n):
        return pyro.sample("x", dist.Bernoulli(p))
class Coin(torch.nn.Module):
    def __init__(self, heads: float = 2.0):
        super().__init__()
        self.heads = heads
    def forward(self, n):
        return coin(n, self.heads)
answer = 42
"""
LINE = """
import pyro, pyro.distributions as dist, torch
class Line(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.loc = torch.nn.Parameter(torch.zeros(()))
        self.log_scale = torch.nn.Parameter(torch.zeros(()))
    def forward(self, n):
        with pyro.plate("data", n):
            return pyro.sample("x", dist.Normal(self.loc, self.log_scale.exp()))
"""


def pgen(*words, code=0):
    """Output of a command that must end with the given exit code."""
    done = CliRunner().invoke(main, [str(w) for w in words])
    told = done.stdout + done.stderr
    assert done.exit_code == code, f"{told}\n{done.exc_info}"
    assert code != 2 or "Traceback" not in told
    return done.stdout if code == 0 else done.stderr


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    _write(tmp_path)
    return tmp_path


def _write(folder):
    (folder / "coin.py").write_text(COIN)
    (folder / "line.py").write_text(LINE)
    (folder / "coin.csv").write_text("x\n1.\n1.\n0.\n1.\n")
    values = torch.randn(400, generator=torch.Generator().manual_seed(1)) * 0.5 + 2.0
    np.savez(folder / "line.npz", x=values.numpy())


# --- words that are values --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Options:
    particles: int = 1
    rate: float | None = None
    objective: Literal["elbo", "iwae"] = "elbo"
    guide: Any = None
    size: int | str = "auto"
    hidden: tuple[int, ...] = (64, 64)
    via: Mapping[str, str] = dataclasses.field(default_factory=dict)
    quick: bool = False
    kind: Exactness = Exactness.EXACT
    call: type = int


def typed_options(*words):
    return typed(Options, words, flag="--set", owner="backend 'b'")


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("particles=8", 8),
        ("rate=1e-3", 1e-3),
        ("rate=none", None),
        ("objective=iwae", "iwae"),
        ("guide=amortized", "amortized"),
        ("guide=3", 3),
        ("size=8", 8),
        ("size=auto", "auto"),
        ("hidden=32,16", (32, 16)),
        ("hidden=32", (32,)),
        ("via=z:score,y:density", {"z": "score", "y": "density"}),
        ("quick=true", True),
        ("quick=no", False),
        ("kind=lower bound", Exactness.LOWER_BOUND),
    ],
)
def test_words_are_typed_by_annotation(word, value):
    found = typed_options(word)[word.partition("=")[0]]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("word", "text"),
    [
        ("partciles=8", "did you mean 'particles'? It has particles=1, rate=None, objective=elbo"),
        ("particles=8.5", "option 'particles' of backend 'b' takes a whole number, not '8.5'"),
        ("particles=true", "a whole number"),
        ("rate=fast", "takes a number or none"),
        ("objective=elb0", "takes elbo, iwae, not 'elb0'"),
        ("hidden=32,x", "whole number, separated by commas"),
        ("via=z", "name:value, separated by commas"),
        ("quick=2", "true or false"),
        ("call=int", "only Python code can give"),
        ("particles", "expected key=value"),
        ("=8", "expected key=value"),
    ],
)
def test_words_that_cannot_be_values(word, text):
    with pytest.raises(OptionError, match="--set") as caught:
        typed_options(word)
    assert text in str(caught.value)


def test_a_word_given_twice_is_refused():
    with pytest.raises(OptionError, match="given twice"):
        pairs(["a=1", "a=2"], "--set")


def test_every_field_of_a_run_can_be_said_or_says_why_not():
    said = {
        "lr": "1e-3",
        "steps": "5",
        "precision": "float64",
        "ema": "0.99",
        "schedule": "cosine",
        "progress": "no",
    }
    run = Run(**typed(Run, [f"{k}={v}" for k, v in said.items()], flag="--run", owner="a run"))
    assert (run.lr, run.steps, run.precision, run.ema, run.schedule, run.progress) == (
        1e-3,
        5,
        "float64",
        0.99,
        "cosine",
        False,
    )


def test_unresolvable_annotations_are_read_as_they_look():
    kind = dataclasses.make_dataclass("Strange", [("a", "NowhereToBeFound", 1)])
    assert typed(kind, ["a=2"], flag="--set", owner="it") == {"a": 2}
    assert plain("1,x") == (1, "x")


# --- programs and data ------------------------------------------------------------------------------------


def test_programs_come_from_files(here):
    function = program_of("coin.py:coin", ["heads=3"])
    assert (function.name, dict(function.kwargs)) == ("coin", {"heads": 3})
    module = program_of("coin.py:Coin", ["heads=3"])
    assert (module.call.heads, dict(module.kwargs)) == (3, {})


@pytest.mark.parametrize(
    ("text", "error", "told"),
    [
        ("coin.py:coyn", UnknownName, "did you mean 'coin'? It defines coin, Coin"),
        ("coin.py", UnknownName, "expected file.py:name"),
        ("nowhere.py:coin", UnknownName, "no file nowhere.py"),
        ("coin.py:answer", ProgramError, "is int, which cannot be called"),
        ("broken.py:x", ProgramError, "broken.py raised ZeroDivisionError"),
        ("vaee", UnknownName, "did you mean 'vae'?"),
    ],
)
def test_programs_that_are_none(here, text, error, told):
    (here / "broken.py").write_text("1 / 0")
    with pytest.raises(error, match="(?i)" + told.replace("?", r"\?").replace("[", r"\[")):
        program_of(text)


def test_arguments_that_a_program_does_not_take(here):
    with pytest.raises(OptionError, match="takes no 'head'; did you mean 'heads'"):
        program_of("coin.py:Coin", ["head=3"])
    with pytest.raises(OptionError, match="takes no 'latent'; did you mean 'latents'"):
        program_of("vae", ["latent=3"])


def test_data_settles_the_arguments_of_a_program(here):
    digits = data_of("digits")
    assert program_of("ppca", data=digits).arguments["features"] == 64
    assert program_of("ppca", ["features=3"], data=digits).arguments["features"] == 3
    assert set(digits.parts) == {"train", "valid", "test"}
    assert isinstance(digits.whole, Data)


def test_data_comes_from_files(here):
    (here / "two.csv").write_text("x[0],x[1],y\n1.5,2,0\n,4,1\n")
    name, found = data_of("two.csv").part(None, "train")
    assert name == "all"
    assert found["x"].shape == (2, 2)
    assert found["x"][1].isnan().tolist() == [True, False]
    assert found["y"].dtype == torch.int64
    save_file({"x": torch.arange(3.0)}, "x.safetensors")
    assert data_of("x.safetensors").part("all")[1]["x"].tolist() == [0, 1, 2]
    assert data_of("line.npz").part(None)[1]["x"].dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.csv", "x\n", "found 1 lines"),
        ("a.csv", "x,y\n1\n", "line 2: 1 fields, and 2 columns"),
        ("a.csv", "x\nten\n", "column 'x' holds something else than numbers"),
        ("a.csv", "x,x\n1,2\n", "same name"),
        ("a.csv", "x[1]\n1\n", r"expected column x[0] where x[1] is"),
        ("a.npz", "not an archive", "cannot be read as .npz"),
        ("a.safetensors", "short", "cannot be read as .safetensors"),
        ("a.txt", "1", "ends in .npz, .csv, .safetensors"),
    ],
)
def test_files_that_hold_no_data(here, name, content, told):
    (here / name).write_text(content)
    with pytest.raises(DataError) as caught:
        data_of(name)
    assert told in str(caught.value)


def test_a_pickle_in_an_archive_is_not_opened(here):
    np.savez(here / "evil.npz", x=np.array([print], dtype=object))
    with pytest.raises(DataError, match=r"evil\.npz cannot be read.*allow_pickle"):
        data_of("evil.npz")


def test_an_unknown_part_is_named(here):
    with pytest.raises(OptionError, match=r"no part 'tset'; did you mean 'test'\? It has train, valid, test"):
        data_of("digits").part("tset")


# --- listing and plugins ----------------------------------------------------------------------------------


def test_list_tells_what_is_installed():
    programs = {row["name"]: row for row in json.loads(pgen("list", "programs", "--json"))}
    assert {"vae", "made", "ppca"} <= programs.keys()
    assert programs["vae"]["options"]["latents"] == "16"
    everything = json.loads(pgen("list", "--json"))
    assert everything.keys() == {"programs", "datasets", "backends", "conversions", "observers"}
    assert "variational" in pgen("list", "backends")


def test_plugins_are_listed_and_can_be_left_out():
    rows = {row["name"]: row for row in json.loads(pgen("plugins", "--json"))}
    assert rows["exact"]["state"] == "active"
    assert rows["exact"]["hooks"] == ["pgen_backends"]
    before = os.environ.get("PGEN_DISABLE_PLUGINS")
    rows = {r["name"]: r for r in json.loads(pgen("--plugin", "no:exact", "plugins", "list", "--json"))}
    assert rows["exact"]["state"] == "disabled"
    assert os.environ.get("PGEN_DISABLE_PLUGINS") == before
    assert "pgen-ppl" in pgen("plugins")


def test_a_plugin_insisted_on_must_be_there():
    assert "no plugin of that name" in pgen("--plugin", "nobody", "plugins", code=2)
    assert json.loads(pgen("--plugin", "exact", "plugins", "--json"))


def test_a_new_plugin_is_written(here):
    assert "wrote pgen-mine" in pgen("plugins", "new", "mine")
    assert (here / "pgen-mine" / "pgen_mine.py").is_file()
    assert "not an empty folder" in pgen("plugins", "new", "mine", code=2)


def test_a_plugin_is_checked_in_a_process_of_its_own():
    found = json.loads(pgen("plugins", "check", "zoo", "--json"))
    assert found["ok"]
    assert "program vae" in found["provides"]


# --- fit, and what is done with it ------------------------------------------------------------------------


FIT = [
    "line.py:Line",
    "--data",
    "line.npz",
    "--backend",
    "exact",
    "--steps",
    300,
    "--lr",
    0.05,
    "--out",
    "run",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """One run directory for all tests, and what `pgen fit` said."""
    folder = tmp_path_factory.mktemp("trained")
    with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", list(sys.path))
        _write(folder)
        return folder / "run", json.loads(pgen("fit", *FIT, "--json"))


@pytest.fixture
def fitted(here, trained):
    shutil.copytree(trained[0], here / "run")
    return trained[1]


def test_fit_writes_a_run_directory(here, fitted):
    assert fitted["run"] == "run"
    assert fitted["stopped"] == "finished"
    config = json.loads((here / "run" / "config.json").read_text())
    assert config["program"] == "line.py:Line"
    assert config["backend"] == "exact"
    assert config["run"]["steps"] == 300
    assert config["versions"]["torch"] == torch.__version__
    lines = [json.loads(line) for line in (here / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["stopped"] == "finished"
    assert sum("loss" in line for line in lines) == 300
    assert {"fit", "loss.png"} <= {p.name for p in (here / "run").iterdir()}


def test_sample_and_evaluate_read_it_again(here, fitted):
    data = torch.from_numpy(np.load("line.npz")["x"])
    told = json.loads(pgen("evaluate", "run", "--data", "line.npz", "--program", "line.py:Line", "--json"))
    best = torch.distributions.Normal(data.mean(), data.std(correction=0)).log_prob(data).mean()
    assert told["kind"] == "exact"
    assert told["nats"] == pytest.approx(float(best), abs=1e-3)
    pgen("sample", "run", "-n", 2000, "--out", "draws.safetensors", "--program", "line.py:Line")
    draws = load_file("draws.safetensors")["x"]
    assert draws.shape == (2000,)
    # Normal: six standard errors leave 2e-9 for the mean, and the fit is off by less than one of them.
    assert abs(float(draws.mean() - data.mean())) < 7 * float(data.std()) / 2000**0.5
    pgen("sample", "run", "-n", 5, "--out", "draws.npz", "--program", "line.py:Line")
    assert np.load("draws.npz")["x"].shape == (5,)
    assert "x" in pgen("sample", "run", "-n", 5, "--program", "line.py:Line")


def test_a_run_directory_does_not_decide_what_is_executed(here, fitted):
    told = pgen("sample", "run", code=2)
    assert "--program line.py:Line" in told


@pytest.mark.parametrize("command", ["sample", "evaluate"])
@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda run: (run / "config.json").unlink(), "no run directory: config.json cannot be read"),
        (lambda run: (run / "config.json").write_text(""), "config.json is empty"),
        (lambda run: (run / "config.json").write_text('{"format": 1, "pro'), "truncated or altered"),
        (lambda run: (run / "config.json").write_text("[1]"), "another format"),
        (lambda run: (run / "config.json").write_bytes(b" " * (2**20 + 1)), "longer than"),
        (lambda run: _change(run, program=7), "'program' must be str, and is int"),
        (lambda run: _change(run, extra=7), "'extra' is no part of a configuration"),
        (lambda run: _change(run, seed=None), "'seed' must be int"),
        (lambda run: _remove(run / "fit"), "holds no finished fit"),
        (lambda run: _flip(run), "fit"),
        (lambda run: _truncate(run), "fit"),
    ],
)
def test_spoilt_run_directories_are_refused(here, fitted, command, spoil, told):
    spoil(here / "run")
    assert told in pgen(
        command,
        "run",
        "--program",
        "line.py:Line",
        *(["--data", "line.npz"] if command == "evaluate" else []),
        code=2,
    )


def _change(run, **values):
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, **values}))


def _remove(folder):
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()


def _tensors(run) -> Path:
    return next((run / "fit").glob("*.safetensors"))


def _flip(run):
    data = bytearray(_tensors(run).read_bytes())
    data[-1] ^= 1
    _tensors(run).write_bytes(data)


def _truncate(run):
    _tensors(run).write_bytes(_tensors(run).read_bytes()[:-3])


def test_a_run_directory_is_not_overwritten(here, fitted):
    words = ["fit", "line.py:Line", "--data", "line.npz", "--backend", "exact", "--steps", 2, "--out", "run"]
    assert "holds a finished run" in pgen(*words, code=2)
    (here / "other").mkdir()
    (here / "other" / "thesis.tex").write_text("years of work")
    for force in ([], ["--force"]):
        assert "no part of a run" in pgen(*words[:-1], "other", *force, code=2)
    assert (here / "other" / "thesis.tex").exists()
    pgen(*words, "--force")
    assert json.loads((here / "run" / "config.json").read_text())["run"]["steps"] == 2


def test_runs_without_a_name_do_not_meet(here):
    words = ["fit", "line.py:Line", "--data", "line.npz", "--backend", "exact", "--steps", 1, "--json"]
    assert [json.loads(pgen(*words))["run"] for _ in range(2)] == ["runs/Line-exact", "runs/Line-exact-2"]


def test_an_interrupted_run_goes_on_where_it_was(here):
    words = [
        "fit",
        "line.py:Line",
        "--data",
        "line.npz",
        "--backend",
        "exact",
        "--run",
        "checkpoint_every=10",
    ]
    whole = json.loads(pgen(*words, "--steps", 40, "--out", "whole", "--json"))
    config = json.loads((here / "whole" / "config.json").read_text())
    assert config["run"]["checkpoint_every"] == 10
    _remove(here / "whole" / "fit")  # as if the process had been killed before it could save
    again = json.loads(pgen(*words, "--steps", 40, "--out", "whole", "--json"))
    assert again["loss"] == whole["loss"]
    _remove(here / "whole" / "fit")
    assert "another configuration" in pgen(*words, "--steps", 50, "--out", "whole", code=2)


def test_explain_and_compare(here):
    told = json.loads(pgen("explain", "coin.py:coin", "--data", "coin.csv", "--json"))
    assert [s["name"] for s in told["sites"]] == ["p", "x"]
    offers = {row["backend"]: row["offered"] for row in told["backends"]}
    assert offers["exact"]
    assert "exact" in pgen("explain", "coin.py:coin", "--data", "coin.csv")
    words = ["compare", "line.py:Line", "--data", "line.npz", "--backend", "exact", "--steps", 5, "--json"]
    compared = json.loads(pgen(*words))
    assert [row["name"] for row in compared["rows"]] == ["exact"]
    assert compared["on"] == "training data"


# --- errors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--backend", "exakt"], "no backend is called 'exakt'; did you mean 'exact'?"),
        (["--backend", "variational", "--set", "partciles=8"], (
            "no option 'partciles'; did you mean 'particles'?"
        )),
        (["--backend", "variational", "--set", "particles=many"], (
            "'particles' of backend 'variational' takes"
        )),
        (["--set", "particles=8"], "--backend NAME --set particles=8"),
        (["--backend", "exact", "--run", "stepz=8"], "a run has no option 'stepz'; did you mean 'steps'?"),
        (["--backend", "exact", "--run", "steps=8", "--steps", "8"], "--run steps=...: say it by --steps"),
        (["--backend", "exact", "--run", "observers=a"], "only Python code can give"),
        (["--backend", "exact", "--steps", "-3"], "a whole number of at least 0"),
        (["--backend", "exact", "--device", "gpu"], "expected a device of this machine"),
        (["--backend", "exact", "--split", "train"], "has no part 'train'. It has all"),
        (["--data", "nowhere.npz"], "no file nowhere.npz"),
        (["--data", "digitz"], "did you mean 'digits'?"),
        (["--data", "strange.npz"], "'strange'"),
    ],
)  # fmt: skip
def test_errors_are_one_message(here, words, told):
    np.savez(here / "strange.npz", strange=np.zeros(3))
    given = words if "--data" in words else ["--data", "line.npz", *words]
    error = pgen("fit", "line.py:Line", "--out", "run", *given, code=2)
    assert error.startswith("Error: ")
    assert told in error
    assert not (here / "run").exists()


def test_debug_shows_the_traceback(here):
    done = CliRunner().invoke(main, ["--debug", "explain", "nobody"])
    assert isinstance(done.exception, UnknownName)


def test_ctrl_c_keeps_what_was_learned(here):
    """In a process of its own: the signal comes from the program itself, at its twentieth call."""
    (here / "slow.py").write_text(
        LINE.replace("import pyro,", "import os, signal, pyro,").replace(
            "    def forward(self, n):",
            "    def forward(self, n):\n"
            "        Line.calls = getattr(Line, 'calls', 0) + 1\n"
            "        if Line.calls == 20: os.kill(os.getpid(), signal.SIGINT)",
        )
    )
    # A shell that runs the tests in the background has them ignore the signal.
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from pgen.cli import main; main(sys.argv[1:])"
    )
    words = [str(w) for w in ["fit", "slow.py:Line", *FIT[1:], "--steps", 100_000, "--json"]]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["stopped"] == "interrupted"
    assert 0 < told["steps"] < 100_000  # a recorded program is called only now and then
    assert "x" in pgen("sample", "run", "-n", 2, "--program", "line.py:Line")
