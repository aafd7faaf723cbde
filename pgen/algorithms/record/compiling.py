"""What the process of its own does that compiles a tape: operations in, a library out.

The compiler is large, takes a while to import, and changes settings, warnings and the state of torch's random
generator on its way; all of that ends with this process.
"""

from __future__ import annotations

import operator
import os
import pickle
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, GraphModule

from pgen.algorithms.record.libraries import Libraries
from pgen.algorithms.record.products import LINEAR
from pgen.algorithms.record.tape import Op, Ref, Tape, mapped


class Order(NamedTuple):
    """What is compiled, as plain values.

    Attributes:
        ops: operations by name, overload, arguments, keywords, and what they give; the first tensors are the inputs.
        outputs: numbers of the results.
        example: shape, stride and type of each input.
    """

    ops: list[tuple[str, str, Any, Any, Any]]
    outputs: list[int]
    example: list[tuple[tuple[int, ...], tuple[int, ...], torch.dtype]]

    @staticmethod
    def of(tape: Tape, example: list[tuple[tuple[int, ...], tuple[int, ...], torch.dtype]]) -> Order:
        """A tape without constants, its tensors numbered in the order in which they come."""
        numbers = {i: at for at, i in enumerate(tape.inputs)}
        for op in tape.ops:
            for i in op.gives():
                numbers.setdefault(i, len(numbers))

        def plain(tree: Any) -> Any:
            return mapped(tree, lambda leaf: Ref(numbers[leaf.index]) if isinstance(leaf, Ref) else leaf)

        ops = [
            (op.func._schema.name, op.func._overloadname, plain(op.args), plain(op.kwargs), plain(op.out))
            for op in tape.ops
        ]
        return Order(ops, [numbers[i] for i in tape.outputs], example)

    def tape(self) -> Tape:
        """The tape again."""
        ops: list[Op] = []
        for name, overload, args, kwargs, out in self.ops:
            namespace, _, function = name.partition("::")
            func = getattr(getattr(getattr(torch.ops, namespace), function), overload or "default")
            ops.append(Op(func, args, kwargs, out))
        return Tape(list(range(len(self.example))), {}, ops, self.outputs)


def main() -> None:
    """Compile the order that is read from standard input, and keep the library under the name that comes with it."""
    threads, folder, work, name, order = pickle.load(sys.stdin.buffer)  # noqa: S301 - of our own making
    os.umask(0o077)
    libraries = Libraries.at(Path(folder))
    # By default torch compiles in a place under /tmp, which others could have made before.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(libraries.folder / "torch"))
    torch.set_num_threads(threads)
    libraries.keep(name, compiled(order, Path(work)))


def compiled(order: Order, work: Path) -> Path:
    """A library, made in a folder."""
    from torch import _inductor  # the compiler: more than a second, and only in this process

    if LINEAR is not None:
        _leave_products()
    tensors = tuple(torch.empty_strided(size, stride, dtype=kind) for size, stride, kind in order.example)
    with torch.no_grad():
        options = {"aot_inductor.output_path": str(work / "model.so")}
        return Path(str(_inductor.aot_compile(_graph(order.tape()), tensors, options=options)))


def _graph(tape: Tape) -> GraphModule:
    """The operations as torch's compiler takes them."""
    graph = Graph()
    nodes: dict[int, Any] = {i: graph.placeholder(f"v{i}") for i in tape.inputs}

    def named(tree: Any) -> Any:
        return mapped(tree, lambda leaf: nodes[leaf.index] if isinstance(leaf, Ref) else leaf)

    for op in tape.ops:
        func, args = (torch.ops.pgen.linear.default, op.args[:3]) if op.func is LINEAR else (op.func, op.args)
        node = graph.call_function(func, named(args), named(op.kwargs))
        if isinstance(op.out, Ref):
            nodes[op.out.index] = node
            continue
        for place, out in enumerate(op.out or ()):
            if isinstance(out, Ref):
                nodes[out.index] = graph.call_function(operator.getitem, (node, place))
    graph.output(tuple(nodes[i] for i in tape.outputs))
    return GraphModule(torch.nn.Module(), graph)


def _leave_products() -> None:
    """Have oneDNN's products called as they are: torch's own rule for them takes only weights that never change."""
    from torch._inductor import ir, mkldnn_ir
    from torch._inductor.lowering import register_lowering

    library = torch.library.Library("pgen", "FRAGMENT")
    library.define("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
    library.impl("linear", lambda x, weight, bias: x.new_empty(x.shape[0], weight.shape[0]), "Meta")

    def call(x: Any, weight: Any, bias: Any) -> Any:
        given = [ir.ExternKernel.realize_input(t) for t in (x, weight, bias) if t is not None]
        size = [x.get_size()[0], weight.get_size()[0]]
        layout = ir.FixedLayout(device=x.get_device(), dtype=x.get_dtype(), size=size)
        plain = ["none", [-1], ""] if bias is not None else [None, "none", [-1], ""]
        product = mkldnn_ir.LinearUnary(layout=layout, inputs=given, constant_args=plain)
        return ir.TensorBox.create(mkldnn_ir._create_output_node(product))

    register_lowering(torch.ops.pgen.linear.default, type_promotion_kind=None)(call)
    _leave_products.library = library  # type: ignore[attr-defined] - it lives as long as this
