"""Products by oneDNN are products, replayed or compiled."""

import shutil

import pytest
import torch
from torch import nn

from pgen.algorithms.record import Inductor, products, record, replay_of
from pgen.algorithms.record.products import LEAST, by_onednn, with_products
from pgen.algorithms.record.recording import recording_of

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this torch was built without oneDNN"
)


@pytest.fixture(autouse=True)
def _wanted(monkeypatch):
    monkeypatch.setattr(products, "pays", lambda: True)


def recorded(rows, width, dtype=torch.float32):
    torch.manual_seed(0)
    layer, x = nn.Linear(width, 300).to(dtype), torch.randn(rows, width, dtype=dtype)

    def function(x):
        loss = layer(x).square().mean()
        return loss, *torch.autograd.grad(loss, list(layer.parameters()))

    return recording_of(function, [x], live=list(layer.parameters())).tape, x


def test_they_give_the_same_forward_and_back():
    tape, x = recorded(64, 200)
    fast, plain = by_onednn(tape, [x]), replay_of(tape)
    changed = with_products(tape, tape.run([x]))
    assert sum("mkldnn" in op.name for op in changed.ops) == 2
    for one, other in zip(plain(x), fast(x), strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("rows", "width", "dtype"), [(4, 8, torch.float32), (64, 200, torch.float64)])
def test_small_ones_and_those_in_double_precision_stay(rows, width, dtype):
    tape, x = recorded(rows, width, dtype)
    assert dtype != torch.float32 or rows * width * 300 < LEAST
    assert with_products(tape, tape.run([x])).ops == tape.ops


def test_a_recording_can_ask_for_them():
    layer, x = nn.Linear(200, 300), torch.randn(64, 200)
    fast = record(lambda x: layer(x).tanh(), compile="products")
    for _ in range(2):
        torch.testing.assert_close(fast(x), layer(x).tanh().detach(), rtol=1e-5, atol=1e-6)
        x = x + 1
    with pytest.raises(ValueError, match="'products', 'inductor'"):
        record(layer, compile="product")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_compiled_they_follow_weights_that_move(tmp_path, compiler_cache):
    tape, x = recorded(64, 200)
    assert any("mkldnn" in op.name for op in with_products(tape, tape.run([x])).ops)
    fast, plain = Inductor(tmp_path)(tape, [x]), replay_of(tape)
    for _ in range(2):
        with torch.no_grad():
            for one, other in zip(plain(x), fast(x), strict=True):
                assert torch.allclose(one, other, rtol=1e-5, atol=1e-6)
            for weight in tape.constants.values():
                if weight.is_contiguous():
                    weight.mul_(0.5)
