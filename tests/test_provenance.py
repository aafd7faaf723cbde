"""Where a tensor came from, through in-place writes, `out=`, `vmap` and views; a leak where it left torch."""

import inspect

import numpy as np
import pytest
import torch

from pgen.provenance import Provenance


@pytest.fixture
def followed():
    """Run a function of marked tensors and give the labels of what it returns, element by element."""

    def follow(function, *values):
        provenance = Provenance()
        names = "abc"
        with provenance:
            marked = [v.clone() for v in values]
            for name, value in zip(names, marked, strict=False):
                provenance.mark(value, name)
            out = function(*marked)
        follow.leaks = provenance.leaks
        if out.ndim == 0:
            return "".join(sorted(provenance.labels(out)))
        return ["".join(sorted(provenance.labels(row))) for row in out]

    return follow


def a():
    return torch.tensor([1.0, 2.0, 3.0])


def b():
    return torch.tensor([4.0, 5.0, 6.0])


def inplace(x, y):
    x += y
    return x


def write_slice(x, y):
    out = torch.zeros(3)
    out[1:2] = x[:1]
    out[2] = y[0] * 2
    return out


def write_through_view(x, y):
    out = torch.zeros(3, 2)
    out.T[0].copy_(x)
    out[1].add_(y[:2])
    return out


def overwrite(x, y):
    x.copy_(y)
    return x


def zero(x):
    x[:2].zero_()
    return x


def out_argument(x, y):
    out = torch.full((3,), 7.0)
    torch.mul(x, y, out=out)
    return out


def out_of_marked(x, y):
    torch.neg(torch.ones(3), out=x)
    return x


def masked_write(x, y):
    out = x.clone()
    out[torch.tensor([True, False, False])] = 0.0
    return out


def put(x, y):
    return x.index_put((torch.tensor([0]),), y[:1])


def accumulate(x, y):
    return x.index_put((torch.tensor([0]),), y[:1], accumulate=True)


def scatter(x, y):
    return torch.zeros(3).scatter(0, torch.tensor([0]), x[:1])


# what a function does to a ([3], label "a") and b ([3], label "b") -> the labels of each row of the result
ROUTES = {
    "pointwise": (lambda x, y: x + y, ["ab", "ab", "ab"]),
    "pointwise with a constant": (lambda x, y: x * 2, ["a", "a", "a"]),
    "untouched": (lambda x, y: torch.ones(3), ["", "", ""]),
    "detach": (lambda x, y: x.detach() + 0, ["a", "a", "a"]),
    "reduction": (lambda x, y: x.sum() + torch.zeros(2), ["a", "a"]),
    "matrix product": (lambda x, y: torch.outer(x, torch.ones(2)), ["a", "a", "a"]),
    "in place": (inplace, ["ab", "ab", "ab"]),
    "overwritten": (overwrite, ["b", "b", "b"]),
    "zeroed in part": (zero, ["", "", "a"]),
    "slices written": (write_slice, ["", "a", "b"]),
    "written through views": (write_through_view, ["a", "ab", "a"]),
    "out=": (out_argument, ["ab", "ab", "ab"]),
    "out= onto a marked tensor": (out_of_marked, ["", "", ""]),
    "masked write": (masked_write, ["", "a", "a"]),
    "index_put": (put, ["b", "a", "a"]),
    "index_put, accumulated": (accumulate, ["ab", "a", "a"]),
    "scatter": (scatter, ["a", "", ""]),
    "cat": (lambda x, y: torch.cat([x[:1], y[:1], torch.ones(1)]), ["a", "b", ""]),
    "stack": (lambda x, y: torch.stack([y, x]), ["b", "a"]),
    "unstacked": (lambda x, y: torch.stack([x, y]).unbind()[1], ["b", "b", "b"]),
    "stacked, permuted, unstacked": (lambda x, y: torch.stack([x, y], -1).T[1], ["b", "b", "b"]),
    "where": (lambda x, y: torch.where(torch.tensor([True, False, True]), x, y), ["a", "b", "a"]),
    "where on a marked condition": (lambda x, y: torch.where(x > 2, 1.0, 0.0), ["a", "a", "a"]),
    "gathered by a marked index": (lambda x, y: b()[x.long() - 1], ["a", "a", "a"]),
    "indexed by a marked scalar": (lambda x, y: torch.eye(3)[x[0].long() - 1], ["a", "a", "a"]),
    "written at a marked scalar": (lambda x, y: put_at(torch.zeros(3), x[0].long() - 1), ["a", "a", "a"]),
    "flip and roll": (lambda x, y: torch.cat([x[:1], y[:1]]).flip(0).roll(1), ["a", "b"]),
    "padded": (lambda x, y: torch.nn.functional.pad(x[:1], (1, 1)), ["", "a", ""]),
    "expanded": (lambda x, y: x[:1].expand(2, 1), ["a", "a"]),
    "cumulative sum": (lambda x, y: torch.cat([x[:1], y[:1]]).cumsum(0), ["ab", "ab"]),
    "vmap": (lambda x, y: torch.vmap(lambda u, v: u * v)(x, y), ["ab", "ab", "ab"]),
    "vmap over one": (lambda x, y: torch.vmap(lambda u: u + 1)(x), ["a", "a", "a"]),
    "vmap with in-place writes": (
        lambda x, y: torch.vmap(lambda u: torch.zeros(2).index_fill(0, torch.tensor([0]), 1.0) * u)(x),
        ["a", "a", "a"],
    ),
    "grad": (lambda x, y: torch.func.grad(lambda u: (u * y).sum())(x), ["b", "b", "b"]),
    "convolution": (lambda x, y: torch.nn.functional.conv1d(x[None], torch.ones(1, 1, 2))[0], ["a", "a"]),
    "custom autograd function": (lambda x, y: Doubled.apply(x), ["a", "a", "a"]),
    "complex numbers": (lambda x, y: torch.view_as_real(torch.complex(x, y))[:, 0], ["a", "a", "a"]),
    "recurrent cell": (lambda x, y: recurrent(x), ["a"]),
    "windows": (lambda x, y: torch.cat([x, y]).unfold(0, 2, 3), ["a", "b"]),
    "a tensor written from numbers of tensors": (
        lambda x, y: torch.stack([x[0], y[0], x[0] + y[0]]),
        ["a", "b", "ab"],
    ),
    "converted to another dtype": (lambda x, y: x.double(), ["a", "a", "a"]),
    "reshaped": (lambda x, y: torch.stack([x, y]).reshape(6)[2:4], ["a", "b"]),
    "softmax": (lambda x, y: x.softmax(0), ["a", "a", "a"]),
    "linear layer": (lambda x, y: torch.nn.functional.linear(torch.ones(2, 3), x[None]), ["a", "a"]),
    "drawn from a law": (lambda x, y: torch.distributions.Normal(x, 1.0).sample(), ["a", "a", "a"]),
    "einsum": (lambda x, y: torch.einsum("i,j->ij", x, y), ["ab", "ab", "ab"]),
    "sorted": (lambda x, y: x.sort().values, ["a", "a", "a"]),
    "boolean test": (lambda x, y: (x > y).float(), ["ab", "ab", "ab"]),
}


#: where more labels than these may be found (never fewer)
SUPERSETS = ("scatter", "where", "grad", "complex numbers")


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


def recurrent(x):
    return torch.nn.GRUCell(3, 1)(x[None])[0]


def put_at(out, index):
    out[index] = 1.0
    return out


@pytest.mark.parametrize("route", ROUTES)
def test_labels_are_followed(followed, route):
    function, expected = ROUTES[route]
    values = (a(), b())[: len(inspect.signature(function).parameters)]
    found = followed(function, *values)
    if route in SUPERSETS:
        assert all(set(e) <= set(f) for e, f in zip(expected, found, strict=True))
    else:
        assert found == expected
    assert not followed.leaks


def test_no_label_is_ever_missed_by_random_programs(followed, seed):
    """A random chain of operations, against the dependence that gradients show."""
    generator = torch.Generator().manual_seed(seed)
    operations = [
        lambda x, y: x * y + x,
        lambda x, y: torch.stack([x, y], 0).reshape(-1)[1:4],
        lambda x, y: torch.cat([x[:2], y[2:]]),
        lambda x, y: x.flip(0) + y[0],
        lambda x, y: x.sum() * torch.ones(3),
        lambda x, y: torch.where(torch.tensor([True, False, True]), x, y),
        lambda x, y: x.index_copy(0, torch.tensor([1]), y[2:]),
        lambda x, y: torch.zeros(3).index_put((torch.tensor([2, 0]),), torch.stack([x[0], y[1]])),
        lambda x, y: torch.vmap(torch.sub)(x, y),
        lambda x, y: x.view(3, 1).expand(3, 2)[:, 1] + 0,
    ]
    for _ in range(30):
        picks = torch.randint(len(operations), (4,), generator=generator).tolist()
        swap = torch.randint(2, (4,), generator=generator).tolist()

        def chain(x, y, picks=picks, swap=swap):
            u, v = x, y
            for pick, turn in zip(picks, swap, strict=True):
                u, v = (operations[pick](u, v), u) if turn else (operations[pick](v, u), v)
            return u

        x, y = a().requires_grad_(), b().requires_grad_()
        out = chain(x, y)
        found = followed(chain, a(), b())
        for i in range(3):
            gradients = (
                torch.autograd.grad(out[i], (x, y), retain_graph=True, allow_unused=True)
                if out[i].requires_grad
                else (None, None)
            )
            needed = {
                n for n, g in zip("ab", gradients, strict=True) if g is not None and bool((g != 0).any())
            }
            assert needed <= set(found[i]), (picks, swap, i)


EXITS = {
    "item": lambda x, y: torch.ones(3) * x[0].item(),
    "float": lambda x, y: torch.ones(3) * float(x[0]),
    "branch": lambda x, y: torch.ones(3) if x[0] > 0 else torch.zeros(3),
    "tolist": lambda x, y: torch.tensor(x.tolist()),
    "numpy": lambda x, y: torch.from_numpy(np.sin(x.numpy())),
    "python index": lambda x, y: torch.tensor([[1.0, 2.0, 3.0]][int(x[0]) - 1]),
    "length of a loop": lambda x, y: sum((torch.ones(3) for _ in range(int(x[1]))), torch.zeros(3)),
}


@pytest.mark.parametrize("exit", EXITS)
def test_an_exit_from_torch_is_reported_with_its_line(followed, exit):
    followed(EXITS[exit], a(), b())
    assert followed.leaks
    leak = followed.leaks[0]
    assert leak.labels == {"a"}
    file, line = leak.where.rsplit(":", 1)
    assert file == __file__
    source, _ = inspect.getsourcelines(inspect.getmodule(EXITS[exit]))
    assert f'"{exit}"' in source[int(line) - 1]


def test_what_was_never_marked_leaves_no_leak(followed):
    followed(lambda x, y: torch.ones(3) * torch.tensor(2.0).item(), a(), b())
    assert not followed.leaks


def test_checks_that_libraries_make_are_no_leaks(followed):
    def checked(x, y):
        law = torch.distributions.Normal(x, 1.0, validate_args=True)
        return law.log_prob(y)

    assert followed(checked, a(), b()) == ["ab", "ab", "ab"]
    assert not followed.leaks


def test_indexing_by_a_number_is_no_leak(followed):
    assert followed(lambda x: torch.eye(3)[x[0].long()], torch.tensor([2.0, 1.0, 0.0])) == ["a", "a", "a"]
    assert not followed.leaks


def test_marks_end_with_the_block():
    provenance = Provenance()
    with provenance:
        x = torch.ones(2)
        provenance.mark(x, "a")
    y = x * 2
    assert provenance.labels(x) == {"a"}
    assert provenance.labels(y) == frozenset()


def test_a_freed_tensor_does_not_pass_its_marks_to_the_next_at_its_address():
    provenance = Provenance()
    with provenance:
        for _ in range(50):
            x = torch.randn(4)
            assert not provenance.labels(x)
            provenance.mark(x, "a")
            del x


def test_values_are_those_of_a_plain_run():
    def program(x):
        y = torch.zeros(3)
        y[1:] = x[:2] * 3
        y[x[0].long() - 1] += 1
        return torch.vmap(torch.sin)(y)

    provenance = Provenance()
    with provenance:
        x = a()
        provenance.mark(x, "a")
        out = program(x)
    assert torch.equal(out, program(a()))


def test_memory_seen_with_elements_of_another_size_keeps_its_labels():
    """A view of a complex tensor as pairs of real numbers: what touches a part of it touches the whole."""
    provenance = Provenance()
    x, other = torch.randn(2, 6), torch.randn(2)
    provenance.mark(x[0], "a")
    provenance.mark(x[1], "b")
    provenance.mark(other, "c")
    with provenance:
        spectrum = torch.fft.fft(x)
        pairs = torch.view_as_real(spectrum)[..., :2, :] * 1.0
        real = spectrum.real * 1.0
        spectrum.imag[0, :2] = other
        after = spectrum.abs()
    assert provenance.labels(pairs) == provenance.labels(real) == {"a", "b"}
    assert provenance.labels(after) == {"a", "b", "c"}


def test_writing_at_a_marked_index_keeps_gradients():
    x = a().requires_grad_()
    provenance = Provenance()
    with provenance:
        provenance.mark(x, "a")
        index = torch.tensor(1)
        provenance.mark(index, "i")
        out = x[index] * 2
    assert provenance.labels(out) == {"a", "i"}
    assert torch.autograd.grad(out, x)[0].tolist() == [0.0, 2.0, 0.0]
