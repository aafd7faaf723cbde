"""The guards of conftest.py: they fail a test that leaves global state behind, and seed each by its name."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

SPECIMENS = """
import pyro, pytest, torch
from pyro.poutine import runtime

def test_dtype(): torch.set_default_dtype(torch.float64)
def test_store(): pyro.param("left", torch.zeros(1))
def test_flags(): pyro.enable_validation(False)
def test_grad(): torch.set_grad_enabled(False)
def test_stack(): runtime._PYRO_STACK.append(pyro.poutine.trace().__enter__())
def test_clean(): assert torch.get_default_dtype() == torch.float32 and torch.is_grad_enabled()
def test_seed(seed): print("drawn", seed, torch.rand(()).item())
"""


def run(folder, *options):
    command = [sys.executable, "-m", "pytest", "-rA", "-p", "no:cacheprovider", "-p", "no:xdist", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    return done.stdout


def drawn(output):
    return next(line for line in output.splitlines() if line.startswith("drawn"))


def test_each_kind_of_pollution_fails_its_test_and_no_other(tmp_path):
    shutil.copy(Path(__file__).resolve().parent.parent / "conftest.py", tmp_path)
    (tmp_path / "test_specimens.py").write_text(SPECIMENS)
    output = run(tmp_path)
    failed = {line.split("::")[1].split(" ")[0] for line in output.splitlines() if line.startswith("ERROR ")}
    assert failed == {"test_dtype", "test_store", "test_flags", "test_grad", "test_stack"}
    assert "7 passed, 5 errors" in output  # the tests themselves pass; what they leave is the error
    assert drawn(output) == drawn(run(tmp_path, "-k", "test_seed"))  # alone or in company
