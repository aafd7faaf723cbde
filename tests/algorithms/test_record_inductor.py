"""Recordings compiled by inductor: the same numbers, live draws, nothing left behind, and a way back."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pgen.algorithms.record import Inductor, NotCompiled, Recorded, inductor, record
from tests.algorithms.record_laws import check, same

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler"
)


def energy(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    value = (torch.nn.functional.softplus(x * scale) - x.sin()).sum(-1)
    return value.detach(), torch.autograd.grad(value.sum(), x)[0]


def step(x: Tensor, count: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    count += 1
    proposal = x + 0.1 * torch.randn_like(x)
    accept = torch.rand(len(x)).log() < energy(x, count)[0] - energy(proposal, count)[0]
    return torch.where(accept[:, None], proposal, x), accept, x, torch.zeros(3)


def inputs() -> tuple[Tensor, Tensor]:
    return torch.randn(8, 3, dtype=torch.float64), torch.rand(3, dtype=torch.float64)


@pytest.mark.slow
@needs_compiler
def test_compiled_functions_give_the_same(tmp_path: Path) -> None:
    compiler = Inductor(tmp_path)
    check(energy, inputs(), inputs(), compiler=compiler)
    assert len(list(tmp_path.iterdir())) == 1
    check(step, (inputs()[0], torch.zeros(())), (inputs()[0], torch.ones(())), compiler=compiler)
    weight = torch.ones(3, dtype=torch.float64)
    captured = Recorded(lambda x: (x * weight.exp()).sin() + 1, fallback=False, compiler=compiler)
    x = inputs()[0]
    for _ in range(3):
        same(captured(x), (x * weight.exp()).sin() + 1)
        weight += 1


PROGRAM = """
import sys, time, torch
from pathlib import Path
from pgen.algorithms.record import Inductor, Recorded
fast = Recorded(lambda x: (x.sin() + x.exp()).sum(-1), fallback=False, compiler=Inductor(Path(sys.argv[1])))
x = torch.ones(4, 3)
torch.manual_seed(0)
began = time.perf_counter()
found = fast(x)
took = time.perf_counter() - began
assert torch.allclose(found, (x.sin() + x.exp()).sum(-1))
assert "torch._inductor" not in sys.modules
state = torch.get_rng_state()
torch.manual_seed(0)
assert torch.equal(state, torch.get_rng_state())
print(took)
"""


@pytest.mark.slow
@needs_compiler
def test_a_second_process_finds_what_the_first_compiled(tmp_path: Path) -> None:
    took = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(tmp_path)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        took.append(float(done.stdout))
    assert took[1] < 1 < took[0]


@pytest.mark.slow
@needs_compiler
def test_in_the_background(tmp_path: Path) -> None:
    fast = Recorded(energy, fallback=False, compiler=Inductor(tmp_path, wait=False))
    x, scale = inputs()
    began = time.monotonic()
    same(fast(x, scale), energy(x, scale))
    (recording,) = fast.recordings.values()
    later: Any = recording.replay
    plain = later._replay
    while later._process is not None and time.monotonic() - began < 120:
        same(fast(x, scale), energy(x, scale))
    assert later._replay is not plain
    same(fast(x, scale), energy(x, scale))


class Failed:
    """A compiler's process that did not get far."""

    returncode = 1

    def __init__(self) -> None:
        self.stderr = io.StringIO("a lot of talk\nInvalidCxxCompiler: error: No working C++ compiler found\n")

    def communicate(self) -> tuple[str, str]:
        return "", self.stderr.read()

    def poll(self) -> int:
        return 1

    def kill(self) -> None:
        pass


@pytest.mark.parametrize("wait", [True, False])
def test_without_a_compiler_operations_are_replayed(
    wait: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inductor, "_started", lambda task, path: Failed())
    fast = Recorded(energy, fallback=False, compiler=Inductor(tmp_path, wait))
    x, scale = inputs()
    with pytest.warns(NotCompiled, match=r"No working C\+\+ compiler") as caught:
        found = [fast(x, scale) for _ in range(40)]
    assert len(caught) == 1
    same(found, [energy(x, scale)] * 40)


def test_a_wrong_library_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inductor, "_started", lambda task, path: Failed())
    monkeypatch.setattr(Failed, "returncode", 0)
    wrong = lambda task, path: lambda *inputs: (inputs[0].sum(-1), inputs[0])  # noqa: E731
    monkeypatch.setattr(inductor._Task, "loaded", wrong)
    fast = Recorded(energy, fallback=False, compiler=Inductor(tmp_path))
    x, scale = inputs()
    with pytest.warns(NotCompiled, match="other numbers"):
        same(fast(x, scale), energy(x, scale))


def test_the_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert Inductor()._place() == tmp_path / "pgen" / "compiled"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert Inductor()._place() == Path.home() / ".cache" / "pgen" / "compiled"


def test_a_compiler_by_name() -> None:
    assert record(energy, compile="background").compiler == Inductor(wait=False)
    assert record(energy).compiler is None
    with pytest.raises(ValueError, match="inductor.*got 'gcc'"):
        record(energy, compile="gcc")
