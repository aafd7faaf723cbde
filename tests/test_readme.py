"""The README: its code runs, its table is what the backends say, its commands and files exist."""

from __future__ import annotations

import contextlib
import io
import re
import runpy
import shlex
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner

import pgen
from pgen.backends.mcmc.samplers import KERNELS
from pgen.capability import Query
from pgen.cli import main
from pgen.commands.inputs import data_of, program_of

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
DATA = {
    "made": "digits",
    "vae": "digits",
    "diffusion": "gaussians",
    "mixture": "gaussians",
    "ppca": "gaussians",
    "logistic-regression": "digits-labelled",
}


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


def rows():
    """Program, backend and the four answers, of each line of the table of exactness."""
    lines = re.findall(r"^\| `([\w-]+)`: [^|]+ \| `([\w-]+)` \|(.*)\|$", TEXT, re.MULTILINE)
    return [
        (program, backend, [cell.strip() for cell in cells.split("|")]) for program, backend, cells in lines
    ]


def test_a_diffusion_is_conditioned_on_counts(tmp_path):
    """x ~ N(0, I) as learned; given the count 7 of rate exp(x1 + x2), the posterior of the sum by quadrature."""
    code = "\n".join(block for block in blocks("python") if "Diffusion(" in block or "teacher=" in block)
    (tmp_path / "diffusion.py").write_text("import torch, pyro, pyro.distributions as dist, pgen\n" + code)
    torch.manual_seed(0)
    names = runpy.run_path(str(tmp_path / "diffusion.py"))
    fitted, student = names["fitted"], names["student"].sample(4000, seed=0)["x"]
    assert float(student.mean(0).abs().max()) < 0.2  # likewise
    assert float((student.std(0) - 1).abs().max()) < 0.2
    drawn = fitted.posterior({"y": torch.tensor([7.0])}, n=1000, seed=0)["x"].sum(-1)
    s = torch.linspace(-6, 6, 4001)
    weight = (-s.square() / 4 + 7 * s - s.exp()).softmax(0)
    mean = (weight * s).sum()
    std = ((weight * s**2).sum() - mean**2).sqrt()
    assert abs(float(drawn.mean() - mean)) < 0.5 * float(std)  # of a prior learned from 1,000 draws
    assert abs(float(drawn.std() / std) - 1) < 0.3


def test_an_inverse_problem_is_answered_better_than_by_the_mean_image(tmp_path):
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn: pip install 'pgen-ppl[data]'")
    code = next(block for block in blocks("python") if "Measured(" in block)
    (tmp_path / "inverse.py").write_text("import torch, pgen\n" + code)
    torch.manual_seed(0)
    names = runpy.run_path(str(tmp_path / "inverse.py"))
    truth, average = names["images"][:4], names["images"].mean(0)
    off = (names["picture"] - truth).square().mean().sqrt()
    assert float(off) < 0.7 * float((average - truth).square().mean().sqrt())
    assert names["doubt"].shape == (4, 64)


def test_the_swap_is_ten_lines_and_runs(tmp_path):
    code = blocks("python")[0]
    (tmp_path / "swap.py").write_text(code)
    assert sum(bool(line.strip()) for line in code.splitlines()) == 10
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        names = runpy.run_path(str(tmp_path / "swap.py"))
    draws = names["fitted"].posterior(n=5000, seed=0)["p"]
    # Beta(5, 3): mean 0.625, sd 0.161; six standard errors are 0.014, and variational offers an estimate.
    found = [float(m) for m in re.findall(r"tensor\((0\.\d+)\)", printed.getvalue())]
    assert found == pytest.approx([0.625, 0.625, 0.625], abs=0.03)
    assert torch.isfinite(draws).all()
    assert "exact" in printed.getvalue()
    assert "lower bound" in printed.getvalue()


@pytest.mark.filterwarnings("ignore")  # of ArviZ, about its own future
def test_the_chains_run(tmp_path):
    pytest.importorskip("arviz_base", reason="needs arviz-base: pip install 'pgen-ppl[diagnostics]'")
    swap, code = blocks("python")[:2]
    (tmp_path / "chains.py").write_text(swap.partition("print")[0] + code)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        names = runpy.run_path(str(tmp_path / "chains.py"))
    assert "R-hat" in printed.getvalue()
    assert names["data_sets"].shape == (1000, 4)
    row = names["fitted"].summary()["p"]
    # Beta(5, 3); six of its own errors are passed by chance with probability 2e-9.
    assert abs(row.mean - 0.625) < 6 * row.mcse_mean
    assert {"posterior", "sample_stats", "log_likelihood"} <= set(names["tree"].children)


def test_the_kernels_are_those_that_there_are():
    lines = re.findall(r"^\| ((?:`[\w-]+`(?:, )?)+) \|[^|]+\| (?:yes|no)", TEXT, re.MULTILINE)
    assert {k for line in lines for k in re.findall(r"`([\w-]+)`", line)} == set(KERNELS)


@pytest.mark.parametrize(("name", "backend", "cells"), rows(), ids=lambda v: v if isinstance(v, str) else "")
def test_the_table_is_what_backends_say(name, backend, cells):
    source = data_of(DATA[name])
    latents = ["latents=1"] if name == "ppca" else []
    program = program_of(name, latents, data=source)
    row = pgen.explain(program.call, source.part("train")[1])[backend]
    queries = [Query.SAMPLE, Query.LOG_PROB, Query.POSTERIOR, Query.MARGINALS]
    said = [row.answer.answers.get(q, "-") for q in queries] if row.offered else ["refused"] * 4
    assert [str(s) for s in said] == cells


def test_the_table_has_every_kind_of_row():
    assert {(program, backend) for program, backend, _ in rows()} >= {
        ("vae", "exact"),
        ("vae", "variational"),
        ("vae", "mcmc"),
        ("logistic-regression", "mcmc"),
    }
    assert len(rows()) == 10


def test_commands_are_spelt_as_the_command_line_has_them():
    commands = [line.partition("#")[0] for block in blocks("sh") for line in block.splitlines()]
    ours = [shlex.split(c.partition("&&")[0])[1:] for c in commands if c.startswith("pgen ")]
    assert len(ours) >= 7
    for words in ours:
        command = main
        while words and words[0] in getattr(command, "commands", {}):
            command = command.commands[words.pop(0)]
        assert command is not main
        command.make_parser(click.Context(command)).parse_args(args=list(words))


def test_targets_and_files_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\w+)", TEXT, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
    for link in re.findall(r"\]\(((?!http)[^)]+)\)", TEXT):
        assert (ROOT / link).exists(), link
    for name in re.findall(r"`((?:pgen|tutorials|plugins)/[\w/.-]*)`", TEXT):
        assert (ROOT / name).exists(), name


def test_the_picture_is_small():
    assert (ROOT / "tutorials" / "samples.png").stat().st_size < 100_000


def test_the_help_of_every_command_is_there():
    for name in main.commands:
        assert CliRunner().invoke(main, [name, "--help"]).exit_code == 0
