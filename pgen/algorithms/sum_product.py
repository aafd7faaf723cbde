r"""Exact sums over discrete variables: tensor variable elimination on plated factor graphs.

A **factor** is a log-table whose dimensions are named, each by a variable or by a plate. A **plate**
repeats what it holds, independently: factors are multiplied over it, never summed. The joint density of
variables x is

\[ \log p(x) = \sum_f \sum_{i \in \text{plates}(f)} f_i(x_{\text{vars}(f),\, i}) \]

and everything here follows from one plan: eliminate the variables of the innermost plates, multiply over
those plates, go outward (Obermeyer, Bingham, Jankowiak, Phan, Chen, 2019, "Tensor variable elimination for
plated factor graphs").

Tables live in log space and may hold -inf; values and gradients stay free of NaN.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pgen.algorithms.factor_graph import (
    MAX_TABLE,
    Factor,
    FactorGraph,
    ImpossibleEvidence,
    Intractable,
    Plan,
    Step,
    TableTooLarge,
    plan_of,
)

__all__ = [
    "MAX_TABLE",
    "Factor",
    "FactorGraph",
    "ImpossibleEvidence",
    "Intractable",
    "TableTooLarge",
    "log_partition",
    "marginals",
    "sample",
]


def _execute(plan: Plan, tables: Sequence[Tensor], record: list[Tensor] | None = None) -> Tensor:
    """Run the steps; `record` receives the product that each step formed, before it was summed."""
    # With finite numbers throughout, no gradient needs a mask to stay free of NaN.
    slots: list[Tensor | None] = [table.clamp_min(_impossible(table.dtype)) for table in tables]
    product: Tensor | None = None
    for step in plan.steps:
        if step.chain:
            product = _chain(
                [_taken(slots, *aligned) for aligned in zip(step.inputs, step.views, strict=True)]
            )
            slots.append(product)
            continue
        product = None
        for slot, view in zip(step.inputs, step.views, strict=True):
            table = _taken(slots, slot, view)
            product = table if product is None else product + table
        if product is None:
            product = torch.zeros(())
        if record is not None:
            record.append(product)
        if step.variable is not None:
            product = _logsumexp(product)
        elif step.products:
            product = product.sum(step.products)
            if step.power != 1.0:
                product = product * step.power
        slots.append(product)
    assert product is not None  # a plan ends with a product
    return product.masked_fill(product < _impossible(product.dtype) / 2, float("-inf"))


def _taken(slots: list[Tensor | None], slot: int, view: tuple[tuple[int, ...], tuple[int, ...]]) -> Tensor:
    """A table, aligned; every slot is used once, so let go of it."""
    table, slots[slot] = slots[slot], None
    assert table is not None  # the planner's invariant
    return table.permute(view[0]).reshape(view[1])


def _copies(table: Tensor) -> int:
    """How many tables there are behind one under `vmap`."""
    inner = table
    while torch._C._functorch.is_functorch_wrapped_tensor(inner):
        inner = torch._C._functorch.get_unwrapped(inner)
    return max(1, inner.numel() // max(1, table.numel()))


def _chain(links: Sequence[Tensor]) -> Tensor:
    """The product of matrices of logs, two by two: as many rounds as the logarithm of their number.

    Särkkä, García-Fernández (2021), "Temporal parallelization of Bayesian smoothers".
    """
    product = torch.stack(torch.broadcast_tensors(*links))
    # written without a change in place, so that a recording knows it as a constant
    eye = torch.eye(product.shape[-1], dtype=torch.bool, device=product.device)
    one = product.new_zeros(product.shape[1:]).masked_fill(~eye, _impossible(product.dtype))
    while len(product) > 1:
        if len(product) % 2:
            product = torch.cat([product, one.unsqueeze(0)])
        left, right = product.unflatten(0, (-1, 2)).unbind(1)
        product = _logsumexp(left.unsqueeze(-1) + right.unsqueeze(-3), -2)
    return product[0]


def _logsumexp(table: Tensor, dim: int = -1) -> Tensor:
    """Over one dimension, of numbers that are all finite.

    Written out, since the exponentials are then those of the backward pass too, and since a sum over few values is
    faster than torch's own function for it.
    """
    largest = table.detach().amax(dim, keepdim=True)
    return (table - largest).exp().sum(dim).log() + largest.squeeze(dim)


def _impossible(dtype: torch.dtype) -> float:
    """A number that stands for -inf in tables: sums of many are finite, and far below all that is possible."""
    return -(torch.finfo(dtype).max ** 0.5)


def log_partition(graph: FactorGraph, *, max_table: int = MAX_TABLE) -> Tensor:
    r"""Log of the sum over all variables of the product of all factors, in nats; differentiable.

    \[ \log Z = \log \sum_x \prod_f \prod_i \exp f_i(x) \]

    Args:
        graph: the factors.
        max_table: most numbers in one intermediate table.

    Returns:
        Tensor with one dimension per plate of `graph.keep`; a scalar where that is empty.

    Raises:
        TableTooLarge: an intermediate table would exceed `max_table`.
        Intractable: variables are coupled across plates such that the sum is exponential in a plate's size.

    >>> from math import exp
    >>> coin = Factor(("x",), torch.tensor([0.25, 0.75]).log())
    >>> flips = Factor(("n", "x"), torch.tensor([[0.1, 0.8], [0.9, 0.2]]).log())
    >>> round(exp(log_partition(FactorGraph((coin, flips), {"x": ()}))), 4)  # 0.25 * 0.09 + 0.75 * 0.16
    0.1425
    """
    plan = plan_of(graph, max_table, copies=max((_copies(factor.log) for factor in graph.factors), default=1))
    total = _execute(plan, [factor.log for factor in graph.factors])
    kept = plan.steps[-1].names
    # Kept plates that no factor of the last product mentions are missing from it: give them their size.
    shape = [plan.sizes[name] if name in kept else 1 for name in graph.keep]
    return total.reshape(shape).expand([plan.sizes[name] for name in graph.keep])


def marginals(graph: FactorGraph, *, max_table: int = MAX_TABLE) -> dict[str, Tensor]:
    r"""Marginal probabilities of every variable, by one backward pass.

    The gradient of log Z with respect to a unary log-potential, taken at zero, is the marginal (Darwiche
    2003, "A differential approach to inference in Bayesian networks").

    Returns:
        For each variable a table [*keep, *plates, values] that sums to one over the last dimension.

    Raises:
        ImpossibleEvidence: the factors have no common support (log Z is -inf).
        ValueError: a plate has a power other than one.
        TableTooLarge, Intractable: see `log_partition`.

    >>> coin = Factor(("x",), torch.tensor([0.25, 0.75]).log())
    >>> flips = Factor(("n", "x"), torch.tensor([[0.1, 0.8], [0.9, 0.2]]).log())
    >>> marginals(FactorGraph((coin, flips), {"x": ()}))["x"]
    tensor([0.1579, 0.8421])
    """
    _refuse_powers(graph)
    sizes = graph.sizes()
    like = graph.factors[0].log
    potentials = {}
    for name in graph.variables:
        names = (*graph.keep, *_inner_plates(graph, name), name)
        zeros = torch.zeros([sizes[other] for other in names], dtype=like.dtype, device=like.device)
        potentials[name] = Factor(names, zeros.requires_grad_())
    detached = tuple(Factor(factor.names, factor.log.detach()) for factor in graph.factors)
    augmented = FactorGraph((*detached, *potentials.values()), graph.variables, graph.keep)
    with torch.enable_grad():
        total = log_partition(augmented, max_table=max_table)
        _refuse_impossible(total)
        if not potentials:
            return {}
        gradients = torch.autograd.grad(total.sum(), [factor.log for factor in potentials.values()])
    # Only round-off keeps the gradients from summing to one already.
    tables = dict(zip(potentials, (gradient.clamp_min(0) for gradient in gradients)))
    return {name: table / table.sum(-1, keepdim=True) for name, table in tables.items()}


def sample(
    graph: FactorGraph,
    n: int,
    *,
    max_table: int = MAX_TABLE,
    generator: torch.Generator | None = None,
    check: bool = True,
) -> dict[str, Tensor]:
    """Exact joint draws: the elimination run backwards, each variable given those eliminated after it.

    Without `check`, impossible evidence is not looked for (under `vmap` it cannot be), and gives meaningless draws.

    Returns:
        For each variable the indices of its values, an integer tensor [n, *keep, *plates].

    Raises:
        ImpossibleEvidence: the factors have no common support (log Z is -inf).
        ValueError: a plate has a power other than one.
        TableTooLarge, Intractable: see `log_partition`.
    """
    _refuse_powers(graph)
    plan = plan_of(graph, max_table)
    tables: list[Tensor] = []
    with torch.no_grad():
        total = _execute(plan, [factor.log for factor in graph.factors], tables)
        if check:
            _refuse_impossible(total)
        sums = [step for step in plan.steps if step.variable is not None]
        widest = max((_width(graph, plan, step) for step in sums), default=1)
        chunk = max(1, max_table // widest)
        draws = [_backward(graph, plan, tables, min(chunk, n - i), generator) for i in range(0, n, chunk)]
    if not draws:
        draws = [_backward(graph, plan, tables, 0, generator)]
    return {name: torch.cat([draw[name] for draw in draws]) for name in graph.variables}


def _width(graph: FactorGraph, plan: Plan, step: Step) -> int:
    """Numbers that one draw needs at a step."""
    width = plan.sizes[step.names[-1]]
    for plate in _dims(graph, step):
        width *= plan.sizes[plate]
    return width


def _dims(graph: FactorGraph, step: Step) -> tuple[str, ...]:
    """Plates of the variable that a step eliminates: the kept ones, then its own."""
    return (*graph.keep, *_inner_plates(graph, step.names[-1]))


def _inner_plates(graph: FactorGraph, name: str) -> tuple[str, ...]:
    return tuple(plate for plate in graph.variables[name] if plate not in graph.keep)


def _backward(
    graph: FactorGraph, plan: Plan, tables: Sequence[Tensor], n: int, generator: torch.Generator | None
) -> dict[str, Tensor]:
    values: dict[str, Tensor] = {}
    for step, table in zip(reversed(plan.steps), reversed(tables), strict=True):
        if step.variable is None:
            continue
        dims = _dims(graph, step)
        place = {plate: i for i, plate in enumerate(dims)}

        index = []
        for name in step.names[:-1]:
            if name in values:
                own = (*graph.keep, *_inner_plates(graph, name))
                index.append(_spread(values[name], own, dims))
            else:
                shape = [1] * (1 + len(dims))
                shape[1 + place[name]] = plan.sizes[name]
                index.append(torch.arange(plan.sizes[name], device=table.device).reshape(shape))
        logits = table[tuple(index)] if index else table
        logits = logits.expand(n, *(plan.sizes[plate] for plate in dims), table.shape[-1])
        # Exponential by its quantile function, as vmap can batch it; in double precision, for the tail.
        uniform = torch.rand(logits.shape, dtype=torch.float64, device=logits.device, generator=generator)
        noise = -torch.log1p(-uniform)
        # Gumbel-max: exact for log-weights that need no normalising; -inf is never the largest.
        values[step.variable] = (logits - noise.clamp_min(1e-300).log()).argmax(-1)
    return values


def _spread(value: Tensor, own: tuple[str, ...], dims: tuple[str, ...]) -> Tensor:
    """View draws [n, *own] along dims [n, *dims], of which `own` are a subset."""
    order = [own.index(plate) for plate in dims if plate in own]
    value = value.permute(0, *(1 + i for i in order))
    return value[(slice(None), *(slice(None) if plate in own else None for plate in dims))]


def _refuse_powers(graph: FactorGraph) -> None:
    tempered = sorted(plate for plate, power in graph.powers.items() if power != 1.0)
    if tempered:
        names = ", ".join(tempered)
        raise ValueError(f"posterior of a subsample: plates {names} are raised to a power; give all rows")


def _refuse_impossible(total: Tensor) -> None:
    bad = ~torch.isfinite(total.detach())
    if bad.any():
        where = f" in {int(bad.sum())} of {total.numel()} rows" if total.dim() else ""
        raise ImpossibleEvidence(
            f"the log of the total weight is {float(total.detach()[bad][0])}{where}: no state is possible"
        )
