"""Recorded functions give what the functions give: value, gradient, type, shape and layout."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pgen.algorithms.record import ManyRecordings, Recorded, record
from tests.algorithms.record_laws import check, same


def t(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype)


def gradient(fn: Any) -> Any:
    """The value of a function and its gradient by the first argument."""

    def both(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        value = fn(x, *rest)
        return value, torch.autograd.grad(value.sum(), x)[0]

    return both


ELEMENTWISE = {
    "polynomial": lambda x: (x**3 - 2 * x + 1) / (x * x + 1),
    "noise of ones and zeros": lambda x: (x + 0) * 1 + torch.zeros_like(x) - x.new_zeros(()),
    "transcendental": lambda x: x.exp().log1p().sqrt() + x.sin() * x.cosh() - x.abs().lgamma() + x.atan(),
    "softplus and friends": lambda x: F.softplus(x) + F.gelu(x) + F.silu(x) + F.elu(x) + F.logsigmoid(x),
    "clamp": lambda x: (
        x.clamp(-0.5, 0.5) + x.clamp(min=0.1) + x.clamp(max=0.2) + torch.clamp(x, x - 1, x + 1)
    ),
    "where": lambda x: torch.where(x > 0, x, x.exp() - 1) + torch.where(x < 0, 0.0, x),
    "alpha": lambda x: torch.add(x, x, alpha=3) - torch.sub(x, 2, alpha=0.5) + torch.rsub(x, 1.0, alpha=2),
    "rounded division": lambda x: (
        torch.div(x, 0.3, rounding_mode="floor") + x % 0.7 + torch.remainder(x, 0.4)
    ),
    "infinities": lambda x: (
        torch.where(x > 0, x, float("-inf")).logsumexp(-1) + torch.maximum(x, x.mean()).sum(-1)
    ),
    "not a number": lambda x: torch.nan_to_num(x.log()) + x.log().isnan().to(x.dtype),
    "double where": lambda x: torch.where(x > 0, torch.where(x > 0, x, 1.0).log(), 0.0),
}
SHAPES = {
    "views": lambda x: x.t().reshape(-1).view(2, -1).unsqueeze(1).expand(2, 3, -1).transpose(0, 2).sum(1),
    "slices": lambda x: x[1:, ::2] * x[:-1, 1::2] + x[-1, 0] - x[..., None, 2][1:],
    "cat and split": lambda x: torch.cat([p * i for i, p in enumerate(x.split([1, 3, 2], 1))], 1),
    "stack and unbind": lambda x: torch.stack([a * b for a, b in zip(x.unbind(0), x.flip(0).unbind(0))]),
    "chunk of one": lambda x: x.chunk(1)[0] + x.unsqueeze(0).unbind(0)[0],
    "gather": lambda x: x.gather(1, x.argsort(1)) + x.take_along_dim(x.argmax(1, keepdim=True), 1),
    "scatter": lambda x: torch.zeros_like(x).scatter(1, x.argsort(1), x) + x.scatter_add(1, x.argsort(1), x),
    "index_put": lambda x: x.index_put((torch.tensor([0, 0]),), x[1:3], accumulate=True),
    "index by tensors": lambda x: x[torch.tensor([2, 0, 1]), torch.tensor([1, 1, 3])] + x[[0, 2, 1]].sum(1),
    "constant mask": lambda x: x[:, torch.tensor([True, False, True, True, False, False])],
    "pad, roll, flip": lambda x: F.pad(x, (1, 2)).roll(3, 1).flip(0)[:, :4],
    "cumulative": lambda x: x.cumsum(0) + x.sigmoid().cumprod(1) + x.logcumsumexp(1),
    "reductions": lambda x: (
        x.mean(0) + x.var(0) + x.std(0, keepdim=True)[0] + x.amax(0) + x.prod(0) + x.norm(dim=0)
    ),
    "sort": lambda x: (
        x.sort(1).values + x.topk(2, 1).values.sum(1, keepdim=True) + x.median(1, keepdim=True).values
    ),
    "einsum": lambda x: torch.einsum("ij,kj->ik", x, x) + x @ x.mT,
    "diagonal": lambda x: (
        torch.diag_embed(x).diagonal(dim1=-2, dim2=-1) + (x[:, :3] @ x[:, :3].mT).tril().sum()
    ),
    "strided result": lambda x: (x.t() * 2, x.t(), x.expand(2, *x.shape), x[:, 1]),
}
MATRICES = {
    "cholesky": lambda x: (
        torch.linalg.cholesky(x @ x.mT + 6 * torch.eye(3, dtype=x.dtype)).diagonal().log().sum()
    ),
    "triangular": lambda x: torch.linalg.solve_triangular(
        x @ x.mT + 3 * torch.eye(3, dtype=x.dtype), x, upper=False
    ),
    "solve": lambda x: torch.linalg.solve(x @ x.mT + torch.eye(3, dtype=x.dtype), x),
    "eigh": lambda x: torch.linalg.eigh(x @ x.mT).eigenvalues,
    "slogdet": lambda x: torch.linalg.slogdet(x @ x.mT + torch.eye(3, dtype=x.dtype)).logabsdet,
    "svd": lambda x: torch.linalg.svdvals(x),
    "fourier": lambda x: torch.fft.rfft(x).abs() + torch.fft.ifft(torch.fft.fft(x)).real[:, :3],
    "complex": lambda x: (
        torch.complex(x, x * 2).mul(1j).conj().angle() + torch.view_as_real(torch.polar(x, x)).sum(-1)
    ),
    "negative view": lambda x: (x * 1j).conj().imag + x,
}


@pytest.mark.parametrize("name", [*ELEMENTWISE, *SHAPES])
def test_values(name: str) -> None:
    fn = {**ELEMENTWISE, **SHAPES}[name]
    check(fn, (t(4, 6),), (t(4, 6),), (t(4, 6, dtype=torch.float32),), (t(6, 4).t(),), tolerance=1e-5)


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_gradients(name: str) -> None:
    check(gradient(ELEMENTWISE[name]), (t(4, 6),), (t(4, 6),))


@pytest.mark.parametrize("name", MATRICES)
def test_linear_algebra(name: str) -> None:
    check(MATRICES[name], (t(3, 5),), (t(3, 5),), tolerance=1e-8)
    if name not in ("complex", "negative view"):
        check(gradient(MATRICES[name]), (t(3, 5),), tolerance=1e-7)


@pytest.mark.parametrize("simplify", [True, False])
def test_second_derivatives(simplify: bool) -> None:
    def hessian_vector(x: Tensor, v: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        energy = (x.sin() * x.roll(1, -1)).sum() + (x**4).mean()
        (g,) = torch.autograd.grad(energy, x, create_graph=True)
        return torch.autograd.grad((g * v).sum(), x)[0]

    check(hessian_vector, (t(3, 4), t(3, 4)), (t(3, 4), t(3, 4)), simplify=simplify)


def energy(x: Tensor) -> Tensor:
    return (x[:-1] * x[1:]).sum() + torch.logsumexp(x, 0) + torch.linalg.norm(x)


TRANSFORMS = {
    "vmap": torch.vmap(energy),
    "chunks": torch.vmap(energy, chunk_size=2),
    "nested": torch.vmap(torch.vmap(energy), in_dims=1),
    "gradient of": torch.func.grad(lambda x: torch.vmap(energy)(x).sum()),
    "vmap of a gradient": torch.vmap(torch.func.grad(energy)),
    "hessian": lambda x: torch.vmap(torch.func.hessian(energy))(x),
    "jacobian forward": lambda x: torch.func.jacfwd(torch.vmap(energy))(x),
    "jacobian backward": lambda x: torch.func.jacrev(torch.vmap(energy))(x),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms(name: str) -> None:
    shape = (5, 3, 4) if name == "nested" else (5, 4)
    check(TRANSFORMS[name], (t(*shape),), (t(*shape),))


class Square(torch.autograd.Function):
    """A derivative of its own, three times the true one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 6 * x * g


def test_custom_functions_keep_their_derivative() -> None:
    check(gradient(lambda x: Square.apply(x).sin()), (t(3, 2),), (t(3, 2),))


MODULES = {
    "convolution": (nn.Conv2d(2, 3, 3, padding=1), (2, 2, 5, 5)),
    "linear": (nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1, bias=False)), (4, 6)),
    "layer norm": (nn.LayerNorm(6), (4, 6)),
    "group norm": (nn.GroupNorm(2, 4), (3, 4, 5)),
    "attention": (nn.MultiheadAttention(8, 2, batch_first=True), (2, 3, 8)),
    "transformer": (nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), (2, 3, 8)),
    "lstm": (nn.LSTM(6, 5, batch_first=True), (2, 4, 6)),
    "gru": (nn.GRU(6, 5), (2, 4, 6)),
    "pooling": (nn.Sequential(nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1)), (2, 3, 6, 6)),
    "upsampling": (nn.Upsample(scale_factor=2, mode="bilinear"), (1, 2, 3, 3)),
    "embedding bag": (nn.Sequential(nn.Linear(4, 4), nn.Softmax(-1), nn.BatchNorm1d(4).eval()), (5, 4)),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules(name: str) -> None:
    module, shape = MODULES[name]
    module = module.double()

    def run(x: Tensor) -> Any:
        x = x.detach().requires_grad_()
        found = module(x, x, x) if name == "attention" else module(x)
        value = found[0] if isinstance(found, tuple) else found
        gradients = torch.autograd.grad(value.square().sum(), [x, *module.parameters()], allow_unused=True)
        return value, [g for g in gradients if g is not None]

    check(run, (t(*shape),), (t(*shape),))


def test_parameters_as_arguments() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1)).double()

    def loss(parameters: dict[str, Tensor], x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        live = {k: p.detach().requires_grad_() for k, p in parameters.items()}
        value = torch.func.functional_call(module, live, (x,)).square().mean()
        return value.detach(), dict(zip(live, torch.autograd.grad(value, list(live.values())), strict=True))

    first = {k: p.detach().clone() for k, p in module.named_parameters()}
    second = {k: p + 1 for k, p in first.items()}
    check(loss, (first, t(5, 3)), (second, t(5, 3)))


def test_types() -> None:
    def mixed(x: Tensor, n: Tensor, m: Tensor) -> tuple[Tensor, ...]:
        return (
            x * n,
            n // 2,
            n << 1,
            m & (x > 0),
            m ^ m,
            ~m,
            x.to(torch.int32),
            x.half().float(),
            n / 3,
            n.bool() | m,
        )

    n = torch.arange(6)
    check(mixed, (t(6), n, n > 2), (t(6), n + 3, n < 2), (t(6, dtype=torch.float32), n.int(), n > 1))


class State(NamedTuple):
    position: Tensor
    extra: dict[str, Tensor]


def test_nested_arguments_and_results() -> None:
    def step(state: State, pair: list[Tensor], scale: float, name: str) -> State:
        new = state.position * scale + pair[0]
        return State(new, {name: new.sum(), **state.extra, "pair": [pair[1], (new, None, 3)]})

    args = (State(t(3), {"a": t(2)}), [t(3), t(1)])
    fast = check(step, (*args, 2.0, "b"), (*args, 3.0, "b"), (*args, 2.0, "c"))
    assert len(fast.recordings) == 3


def test_a_kind_is_shapes_types_strides_and_plain_values() -> None:
    fast = record(lambda x, *rest: x * 2)
    x = torch.ones(2, 3)
    for args in [
        (x,), (x[:1],), (x.t(),), (x.double(),), (x, 1), (x, 1.0), (x, True), (x, None), (x, -0.0), (x, 0.0), ([x],), ((x,),),
    ]:  # fmt: skip
        fast(*args) if isinstance(args[0], Tensor) else None
    assert len(fast.recordings) == 10
    fast(torch.zeros(2, 3))
    assert len(fast.recordings) == 10


def test_a_default_type_and_device_are_part_of_the_kind() -> None:
    fast = record(lambda x: torch.ones(3) * x)
    x = torch.ones(3)
    assert fast(x).dtype == torch.float32
    try:
        torch.set_default_dtype(torch.float64)
        assert fast(x).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        assert Recorded(lambda: torch.ones(3))().device.type == "meta"
    meta = Recorded(lambda x: x * 2)
    assert meta(torch.ones(2, device="meta")).device.type == "meta"
    assert meta(torch.ones(2)).device.type == "cpu"


def test_arguments_by_name() -> None:
    fast = record(lambda x, *, power=1: x**power)
    x = torch.tensor([3.0])
    assert [float(fast(x, power=2)), float(fast(x, power=3)), float(fast(x, power=2))] == [9, 27, 9]


def test_automatic_casts() -> None:
    module = nn.Linear(4, 4)

    def run(x: Tensor) -> Tensor:
        return module(x).exp() @ x.mT

    fast = Recorded(run, fallback=False)
    x = torch.randn(3, 4)
    for _ in range(2):
        same(fast(x), run(x))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            same(fast(x), run(x), 1e-2)
            assert fast(x).dtype == torch.bfloat16
    inside = Recorded(lambda x: _casting(module, x), fallback=False)
    for _ in range(2):
        same(inside(x), _casting(module, x), 1e-2)
    assert not torch.is_autocast_enabled("cpu")


def _casting(module: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return module(x)


def test_a_call_within_a_recording_or_a_vmap_is_part_of_it() -> None:
    inner = Recorded(lambda x: x * 2 + torch.rand(2), fallback=False)

    def outer(x: Tensor) -> Tensor:
        return inner(x) + inner(x.flip(0)) * torch.rand(2)

    check(outer, (t(2),), (t(2),))
    square = Recorded(lambda x: x * x, fallback=False)
    x = t(3, 2)
    square(x[0])
    same(torch.vmap(square)(x), x * x)
    same(Recorded(torch.vmap(square), fallback=False)(x), x * x)


def test_no_gradient_flows_and_modes_stay_as_they_were() -> None:
    fast = record(lambda x: x * 2)
    x = torch.ones(2, requires_grad=True)
    for _ in range(2):
        assert not fast(x).requires_grad
        assert torch.is_grad_enabled()
        with torch.no_grad():
            fast(x)
            assert not torch.is_grad_enabled()
        with torch.inference_mode():
            fast(torch.ones(2))
    assert fast(torch.ones(2)).tolist() == [2, 2]


def test_too_many_kinds_are_pointed_out() -> None:
    fast = record(lambda x, step: x * step)
    with pytest.warns(ManyRecordings, match="as tensors"):
        assert len([fast(torch.ones(1), i / 7) for i in range(40)]) == 40


def test_lifting_gives_double_precision() -> None:
    def program(x: Tensor) -> Tensor:
        scale = torch.tensor([1.0, 2.0, 3.0])  # single, as programs write it
        return (x.to(scale.dtype) / scale).sin().sum() + torch.ones(3).logsumexp(0)

    x = t(3)
    fine = (x / torch.tensor([1.0, 2.0, 3.0], dtype=x.dtype)).sin().sum() + torch.ones(
        3, dtype=x.dtype
    ).logsumexp(0)
    fast = Recorded(program, lift=True, fallback=False)
    for _ in range(2):
        assert abs(float(fast(x) - fine)) < 1e-12
    # Bits cannot be carried over: computed in single precision, given in double.
    odd = Recorded(lambda x: x.float().view(torch.int32).sum() + x.float().sum(), lift=True, fallback=False)
    assert odd(x).dtype == torch.float64
