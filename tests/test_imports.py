"""What importing costs, and who may import whom."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import pgen

ROOT = Path(__file__).resolve().parent.parent
THREADS = {**os.environ, "OMP_NUM_THREADS": "1"}


def run_python(code):
    """What a fresh interpreter prints, as JSON."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=THREADS,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def least(measure, bound, tries=4):
    """The least of a few measurements: a busy machine only adds to them."""
    best = measure()
    for _ in range(tries - 1):
        if best < bound:
            break
        best = min(best, measure())
    return best


def test_importing_pgen_imports_no_backend_and_no_extra():
    code = "import json, sys, pgen; print(json.dumps(sorted(sys.modules)))"
    modules = set(run_python(code))
    extras = {"sklearn", "matplotlib", "arviz_base", "arviz_stats", "tensorboardX", "pandas", "scipy.stats"}
    ours = ("pgen.backends", "pgen.zoo", "pgen.commands", "pgen.cli", "pgen_")
    assert not {m for m in modules if m.startswith(ours)} | extras & modules


def test_importing_pgen_costs_little_more_than_importing_pyro():
    code = (
        "import json, time\n"
        "start = time.process_time(); import pyro\n"
        "between = time.process_time(); import pgen; pgen.fit\n"
        "print(json.dumps((time.process_time() - between) / (between - start)))"
    )
    assert least(lambda: run_python(code), 0.28) < 0.35


@pytest.mark.parametrize("arguments", [["--help"], ["fit", "--help"], ["plugins", "--help"], ["--version"]])
def test_help_imports_no_torch(arguments):
    code = (
        "import json, sys, time\n"
        "start = time.process_time()\n"
        "from importlib.metadata import entry_points\n"
        "main = next(iter(entry_points(group='console_scripts', name='pgen'))).load()\n"
        f"try: main({arguments})\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "seconds = time.process_time() - start\n"
        "heavy = [m for m in ('torch', 'pyro', 'numpy', 'networkx', 'zuko') if m in sys.modules]\n"
        "print(); print(json.dumps([seconds, heavy]))"
    )
    seconds, heavy = run_python(code)
    assert heavy == []
    assert least(lambda: run_python(code)[0], 0.5) < 1.0, seconds


def test_import_contracts_hold():
    command = [str(Path(sys.executable).parent / "lint-imports"), "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_version_is_the_distributions():
    assert pgen.__version__ == version("pgen-ppl")


def test_public_names_are_there_and_documented():
    names = [name for name in dir(pgen) if not name.startswith("_")]
    expected = {"fit", "backend", "explain", "structure_of", "compare", "load", "Run", "hookimpl", "hookspec"}
    assert expected | {"Registry", "errors", "distributions", "testing"} <= set(names)
    undocumented = [
        name
        for name in names
        if callable(getattr(pgen, name)) and not getattr(getattr(pgen, name), "__doc__", None)
    ]
    assert undocumented == []
