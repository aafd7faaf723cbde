"""Recordings compiled by inductor: the same numbers, live draws, nothing left behind, and a way back."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pgen.algorithms.record import Inductor, NotCompiled, Recorded, inductor, record, tape_of
from pgen.algorithms.record.libraries import Libraries
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
@pytest.mark.usefixtures("compiler_cache")
@needs_compiler
def test_compiled_functions_give_the_same(tmp_path: Path) -> None:
    compiler = Inductor(tmp_path)
    check(energy, inputs(), inputs(), compiler=compiler)
    assert len(list(tmp_path.glob("*.so"))) == 1
    assert not list(tmp_path.glob("work-*"))
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
@pytest.mark.usefixtures("compiler_cache")
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
@pytest.mark.usefixtures("compiler_cache")
@needs_compiler
def test_in_the_background(tmp_path: Path) -> None:
    fast = Recorded(energy, fallback=False, compiler=Inductor(tmp_path, wait=False))
    x, scale = inputs()
    began = time.monotonic()
    same(fast(x, scale), energy(x, scale))
    (recording,) = fast.recordings.values()
    later: Any = recording.replay
    plain = later._replay
    while later._compiling is not None and time.monotonic() - began < 200:
        same(fast(x, scale), energy(x, scale))
    assert later._replay is not plain
    same(fast(x, scale), energy(x, scale))


class Ended:
    """A compiler's process that is done."""

    def __init__(self, returncode: int) -> None:
        self.returncode = returncode

    def poll(self) -> int:
        return self.returncode

    def wait(self) -> int:
        return self.returncode

    def kill(self) -> None:
        pass


def failed(task: inductor.Task, folder: Path, work: Path) -> Any:
    (work / "said").write_text("a lot of talk\nInvalidCxxCompiler: error: No working C++ compiler found\n")
    return Ended(1)


def empty(task: inductor.Task, folder: Path, work: Path) -> Any:
    """Leaves a library, with nothing in it."""
    (work / "said").touch()
    (work / "model.so").touch()
    Libraries(folder).keep(task.name, work / "model.so")
    return Ended(0)


@pytest.mark.parametrize("wait", [True, False])
def test_without_a_compiler_operations_are_replayed(
    wait: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inductor, "started", failed)
    fast = Recorded(energy, fallback=False, compiler=Inductor(tmp_path, wait))
    x, scale = inputs()
    with pytest.warns(NotCompiled, match=r"No working C\+\+ compiler") as caught:
        found = [fast(x, scale) for _ in range(40)]
    assert len(caught) == 1
    same(found, [energy(x, scale)] * 40)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("wait", [True, False])
def test_a_wrong_library_is_found_out(wait: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inductor, "started", empty)
    wrong = lambda task, path: lambda *inputs: (inputs[0].sum(-1), inputs[0])  # noqa: E731
    monkeypatch.setattr(inductor.Task, "loaded", wrong)
    fast = Recorded(energy, fallback=False, compiler=Inductor(tmp_path, wait))
    x, scale = inputs()
    with pytest.warns(NotCompiled, match="other numbers"):
        found = [fast(x, scale) for _ in range(40)]
    same(found, [energy(x, scale)] * 40)


def test_a_process_ends_with_who_waits_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def asleep(task: inductor.Task, folder: Path, work: Path) -> Any:
        return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])

    monkeypatch.setattr(inductor, "started", asleep)
    tape, _ = tape_of(lambda x: x.sin() + 1, [torch.ones(3)])
    later: Any = Inductor(tmp_path, wait=False)(tape, [torch.ones(3)])
    process = later._compiling._process
    assert torch.equal(later(torch.zeros(3))[0], torch.ones(3))
    assert process.poll() is None
    del later
    assert process.poll() is not None
    assert not list(tmp_path.iterdir())


def test_a_folder_of_others_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    fast = Recorded(energy, fallback=False, compiler=Inductor(tmp_path))
    x, scale = inputs()
    with pytest.warns(NotCompiled, match="others may write to it"):
        same(fast(x, scale), energy(x, scale))


def test_a_compiler_by_name() -> None:
    assert record(energy, compile="background").compiler == Inductor(wait=False)
    assert record(energy).compiler is None
    with pytest.raises(ValueError, match="inductor.*got 'gcc'"):
        record(energy, compile="gcc")
