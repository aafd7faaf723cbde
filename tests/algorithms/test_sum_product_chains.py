"""Markov chains multiplied two by two: the same totals and gradients as from end to end, by far fewer operations."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from pgen.algorithms import factor_graph, sum_product
from pgen.algorithms.elimination import chains_of
from pgen.algorithms.sum_product import Factor, FactorGraph, log_partition, marginals


@pytest.fixture
def by_ends(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Chains of any length are long."""
    monkeypatch.setattr(factor_graph, "LONG_CHAIN", 2)
    factor_graph.plan_scopes.cache_clear()
    yield
    factor_graph.plan_scopes.cache_clear()


def links(length: int, *, names: tuple[str, ...] = (), rows: int = 2, zeros: float = 0.0) -> FactorGraph:
    """A hidden Markov chain of three states, with observations, perhaps in plates."""
    lead = [rows] * len(names)
    variables = {f"z{t}": tuple(n for n in names if n != "kept") for t in range(length)}
    factors = [Factor((*names, "z0"), torch.randn(*lead, 3, dtype=torch.float64))]
    for t in range(1, length):
        pair = torch.randn(*lead, 3, 3, dtype=torch.float64)
        pair = pair.masked_fill(torch.rand(pair.shape) < zeros, float("-inf"))
        forth = t % 2 == 0  # links may be given either way round
        scope = (f"z{t - 1}", f"z{t}") if forth else (f"z{t}", f"z{t - 1}")
        factors.append(Factor((*names, *scope), pair))
        if t % 3:
            factors.append(Factor((*names, f"z{t}"), torch.randn(*lead, 3, dtype=torch.float64)))
    return FactorGraph(tuple(factors), variables, ("kept",) if "kept" in names else ())


def from_end_to_end(graph: FactorGraph) -> Tensor:
    plan = factor_graph.plan_of(graph)
    return sum_product._execute(plan, [factor.log for factor in graph.factors])


def uses_chains(graph: FactorGraph, copies: int = 1) -> bool:
    return any(step.chain for step in factor_graph.plan_of(graph, copies=copies).steps)


@pytest.mark.usefixtures("by_ends")
@pytest.mark.parametrize("length", [3, 4, 5, 8, 13, 30])
@pytest.mark.parametrize("names", [(), ("i",), ("kept",), ("kept", "i")])
@pytest.mark.parametrize("zeros", [0.0, 0.3])
def test_totals_and_gradients(length: int, names: tuple[str, ...], zeros: float) -> None:
    graph = links(length, names=names, zeros=zeros)
    assert uses_chains(graph)
    tables = [factor.log.requires_grad_() for factor in graph.factors]
    found, expected = log_partition(graph), from_end_to_end(graph)
    torch.testing.assert_close(found, expected.reshape(found.shape))
    mine = torch.autograd.grad(found.sum(), tables)
    for one, other in zip(mine, torch.autograd.grad(expected.sum(), tables), strict=True):
        assert torch.isfinite(one).all()
        torch.testing.assert_close(one, other)


@pytest.mark.usefixtures("by_ends")
def test_chains_between_other_things() -> None:
    """A ring; branches; a variable that two chains share; names that meet three at once."""
    table = lambda *shape: torch.randn(*shape, dtype=torch.float64)  # noqa: E731
    scopes = {
        "ring": ["ab", "bc", "cd", "de", "ea"],
        "star": ["ab", "bc", "cd", "be", "ef", "fg", "bh"],
        "triangle inside": ["ab", "bc", "cde", "ef", "fg", "gh"],
        "two chains": ["ab", "bc", "cd", "ef", "fg", "gh"],
        "loop with a tail": ["ab", "bc", "cd", "da", "de", "ef", "fg"],
    }
    for scope in scopes.values():
        variables = dict.fromkeys(sorted(set("".join(scope))), ())
        graph = FactorGraph(tuple(Factor(tuple(s), table(*[3] * len(s))) for s in scope), variables)
        torch.testing.assert_close(log_partition(graph), from_end_to_end(graph))
        assert sorted(marginals(graph)) == sorted(variables)


@pytest.mark.usefixtures("by_ends")
def test_a_wrong_order_of_links_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, right = links(9), sum_product._chain
    monkeypatch.setattr(sum_product, "_chain", lambda tables: right([table.mT for table in tables]))
    assert not torch.allclose(log_partition(graph), from_end_to_end(graph))


def test_few_operations_where_chains_are_long_and_copies_few() -> None:
    graph = links(200)
    assert uses_chains(graph, copies=4)
    assert not uses_chains(graph, copies=1000)  # the arithmetic outweighs the calls
    assert not uses_chains(links(10))
    tables = torch.randn(5, *graph.factors[0].log.shape, dtype=torch.float64)

    def total(first: Tensor) -> Tensor:
        return log_partition(FactorGraph((Factor(("z0",), first), *graph.factors[1:]), graph.variables))

    torch.testing.assert_close(torch.vmap(total)(tables), torch.stack([total(table) for table in tables]))


def test_an_impossible_chain() -> None:
    graph = links(40)
    broken = Factor(
        graph.factors[5].names, torch.full_like(graph.factors[5].log, float("-inf")).requires_grad_()
    )
    found = log_partition(FactorGraph((*graph.factors[:5], broken, *graph.factors[6:]), graph.variables))
    assert float(found.detach()) == float("-inf")
    assert torch.isfinite(torch.autograd.grad(found, broken.log)[0]).all()


def test_chains_are_paths_with_free_ends() -> None:
    assert chains_of(["ab", "bc", "ca"], "abc") == []
    assert chains_of(["ab", "bc", "cd", "ae"], "bc") == [["a", "b", "c", "d"]]
    assert chains_of(["abc", "cd", "de"], "abcde") == [["c", "d", "e"]]
