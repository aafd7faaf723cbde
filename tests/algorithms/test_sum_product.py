"""Laws of exact summation: every answer equals brute force over the unrolled model."""

from __future__ import annotations

import itertools
import time

import pytest
import torch
from torch import Tensor

from pgen.algorithms.elimination import colouring, elimination_order, moral_neighbours
from pgen.algorithms.sum_product import (
    Factor,
    FactorGraph,
    Intractable,
    TableTooLarge,
    log_partition,
    marginals,
    sample,
)

SIZES = {"a": 2, "b": 3, "c": 2, "d": 2, "i": 2, "j": 3, "r": 4}
PLATED = {
    "single": ({"a": ()}, ["a"]),
    "tree": ({"a": (), "b": (), "c": (), "d": ()}, ["a", "ab", "ac", "cd", "b"]),
    "loop": ({"a": (), "b": (), "c": (), "d": ()}, ["ab", "bc", "cd", "da"]),
    "disconnected": ({"a": (), "b": ()}, ["a", "b"]),
    "mixture": ({"a": ("i",)}, ["ia", "ia"]),
    "shared": ({"a": (), "b": ("i",)}, ["a", "iab", "ib"]),
    "likelihood of a global": ({"a": ()}, ["a", "ia"]),
    "chain of plates": ({"a": (), "b": ("i",), "c": ("i", "j")}, ["a", "iab", "ijbc", "ijc"]),
    "skipping a plate": ({"a": (), "c": ("i", "j")}, ["a", "ijac", "ijc"]),
    "two plates": ({"a": ("i",), "b": ("j",), "c": ()}, ["c", "iac", "jbc", "ia", "jb"]),
    "chain in a plate": ({"a": ("i",), "b": ("i",), "c": ("i",), "d": ()}, ["d", "iad", "iab", "ibc", "ic"]),
}
IMPOSSIBLE = float("-inf")


def build(case: str, *, zeros: bool = False, seed: int = 0, keep: tuple[str, ...] = ()) -> FactorGraph:
    variables, scopes = PLATED[case]
    generator = torch.Generator().manual_seed(seed)
    factors = []
    for scope in scopes:
        log = torch.randn([SIZES[name] for name in scope], dtype=torch.float64, generator=generator)
        if zeros and len(scope) > 1:
            impossible = torch.rand(log.shape, generator=generator) < 0.25
            # The state of all zeros stays possible.
            impossible[tuple(0 if name in variables else slice(None) for name in scope)] = False
            log = log.masked_fill(impossible, IMPOSSIBLE)
        factors.append(Factor(tuple(scope), log))
    return FactorGraph(tuple(factors), variables, keep)


def states(graph: FactorGraph) -> tuple[list[tuple[str, tuple[int, ...]]], list[tuple[int, ...]]]:
    """Unrolled variables (name, position in its plates) and all their joint values."""
    sizes = graph.sizes()
    cells = [
        (name, place)
        for name, plates in graph.variables.items()
        for place in itertools.product(*(range(sizes[plate]) for plate in plates))
    ]
    return cells, list(itertools.product(*(range(sizes[name]) for name, _ in cells)))


def weight(graph: FactorGraph, cells: list[tuple[str, tuple[int, ...]]], state: tuple[int, ...]) -> Tensor:
    value = dict(zip(cells, state, strict=True))
    sizes, total = graph.sizes(), torch.zeros((), dtype=torch.float64)
    for factor in graph.factors:
        plates = [name for name in factor.names if name not in graph.variables]
        for place in itertools.product(*(range(sizes[plate]) for plate in plates)):
            at = dict(zip(plates, place, strict=True))
            index = tuple(
                at[name] if name in at else value[name, tuple(at[plate] for plate in graph.variables[name])]
                for name in factor.names
            )
            total = total + factor.log[index]
    return total


def brute(graph: FactorGraph) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Log Z, marginals and the probability of every joint state."""
    cells, all_states = states(graph)
    logs = torch.stack([weight(graph, cells, state) for state in all_states])
    total = logs.logsumexp(0)
    probabilities = (logs - total).exp()
    sizes, tables = graph.sizes(), {}
    for name, plates in graph.variables.items():
        table = torch.zeros([sizes[plate] for plate in plates] + [sizes[name]], dtype=torch.float64)
        for state, p in zip(all_states, probabilities, strict=True):
            for (other, place), value in zip(cells, state, strict=True):
                if other == name:
                    table[(*place, value)] += p
        tables[name] = table
    return total, tables, probabilities


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("case", PLATED)
def test_log_partition_and_marginals_equal_brute_force(case: str, zeros: bool) -> None:
    graph = build(case, zeros=zeros)
    total, tables, _ = brute(graph)
    torch.testing.assert_close(log_partition(graph), total)
    answers = marginals(graph)
    assert answers.keys() == tables.keys()
    for name, table in tables.items():
        torch.testing.assert_close(answers[name], table)


@pytest.mark.parametrize("case", PLATED)
def test_gradients_equal_those_of_brute_force(case: str) -> None:
    graph = build(case, zeros=True)
    for factor in graph.factors:
        factor.log.requires_grad_()
    tables = [factor.log for factor in graph.factors]
    exact = torch.autograd.grad(brute(graph)[0], tables)
    ours = torch.autograd.grad(log_partition(graph), tables)
    for table, left, right in zip(tables, ours, exact, strict=True):
        possible = table.detach() > IMPOSSIBLE
        torch.testing.assert_close(left[possible], right[possible])
        assert torch.isfinite(left).all()


@pytest.mark.parametrize("case", ["shared", "chain of plates", "two plates", "loop"])
def test_draws_have_the_joint_distribution(case: str) -> None:
    # Every joint state is one cell of a chi-square test. Its statistic exceeds df + 7 sqrt(2 df) + 30 with
    # probability below 1e-7 for these df (Laurent & Massart 2000: x = 15 gives 2 sqrt(15 df) + 30).
    graph, n = build(case, zeros=True), 20_000
    cells, all_states = states(graph)
    probabilities = brute(graph)[2]
    draws = sample(graph, n, generator=torch.Generator().manual_seed(1))
    columns = torch.stack([draws[name][(slice(None), *place)] for name, place in cells], -1)
    radix = torch.tensor([graph.sizes()[name] for name, _ in cells])
    code = torch.zeros(n, dtype=torch.long)
    for k, size in enumerate(radix.tolist()):
        code = code * size + columns[:, k]
    counts = torch.bincount(code, minlength=len(all_states)).double()
    assert (counts[probabilities == 0] == 0).all(), "an impossible state was drawn"
    expected = probabilities * n
    large = expected >= 5
    observed = torch.cat([counts[large], counts[~large].sum()[None]])
    expected = torch.cat([expected[large], expected[~large].sum()[None]]).clamp_min(1e-9)
    statistic, df = ((observed - expected) ** 2 / expected).sum(), len(observed) - 1
    assert statistic < df + 2 * (15 * df) ** 0.5 + 30

    # The check can fail: draws of another graph do not pass it.
    other = brute(build(case, zeros=True, seed=9))[2] * n
    assert ((counts - other) ** 2 / other.clamp_min(1e-9)).sum() > df + 2 * (15 * df) ** 0.5 + 30


def test_kept_plates_are_separate_problems() -> None:
    variables = {"a": (), "b": ("r",), "c": ("r", "i")}
    torch.manual_seed(0)
    scopes = ["a", "rab", "irbc", "ric"]
    tables = [torch.randn([SIZES[name] for name in scope], dtype=torch.float64) for scope in scopes]
    factors = tuple(Factor(tuple(scope), table) for scope, table in zip(scopes, tables))
    graph = FactorGraph(factors, variables, ("r",))
    totals, tables_of = log_partition(graph), marginals(graph)
    draws = sample(graph, 5)
    assert totals.shape == (4,)
    shapes = {name: tuple(table.shape) for name, table in tables_of.items()}
    assert shapes == {"a": (4, 2), "b": (4, 3), "c": (4, 2, 2)}
    shapes = {name: tuple(draw.shape) for name, draw in draws.items()}
    assert shapes == {"a": (5, 4), "b": (5, 4), "c": (5, 4, 2)}
    for row in range(4):
        factors = tuple(
            Factor(tuple(s.replace("r", "")), t.select(s.index("r"), row) if "r" in s else t)
            for s, t in zip(scopes, tables, strict=True)
        )
        alone = FactorGraph(factors, {"a": (), "b": (), "c": ("i",)})
        torch.testing.assert_close(totals[row], log_partition(alone))
        for name, table in marginals(alone).items():
            torch.testing.assert_close(tables_of[name][row], table)


def test_a_power_stands_for_the_rows_that_are_not_seen() -> None:
    graph = build("shared")
    doubled = tuple(
        Factor(f.names, torch.cat([f.log, f.log]) if f.names[0] == "i" else f.log) for f in graph.factors
    )
    whole = log_partition(FactorGraph(doubled, graph.variables))
    half = FactorGraph(graph.factors, graph.variables, powers={"i": 2.0})
    torch.testing.assert_close(log_partition(half), whole)
    with pytest.raises(ValueError, match="subsample: plates i"):
        marginals(half)
    with pytest.raises(ValueError, match="subsample: plates i"):
        sample(half, 3)


def test_an_impossible_total_is_minus_infinity_without_nan() -> None:
    log = torch.full((2, 3), IMPOSSIBLE, dtype=torch.float64, requires_grad=True)
    prior = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    graph = FactorGraph((Factor(("a",), prior), Factor(("a", "b"), log)), {"a": (), "b": ()})
    total = log_partition(graph)
    assert total == IMPOSSIBLE
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(total, [log, prior]))
    for query in (marginals, lambda g: sample(g, 2)):
        with pytest.raises(ValueError, match="no state is possible"):
            query(graph)


def test_coupled_plates_are_refused_by_name() -> None:
    scopes = ["ia", "jb", "ijab"]
    factors = tuple(Factor(tuple(s), torch.zeros([SIZES[name] for name in s])) for s in scopes)
    with pytest.raises(Intractable, match="a, b are coupled across all of plates i, j") as caught:
        log_partition(FactorGraph(factors, {"a": ("i",), "b": ("j",)}))
    assert caught.value.variables == ("a", "b")


def test_a_table_beyond_the_limit_is_refused_before_it_is_allocated() -> None:
    names = [f"x{i}" for i in range(40)]
    factors = tuple(Factor((u, v), torch.zeros(4, 4)) for u, v in itertools.combinations(names, 2))
    started = time.perf_counter()
    with pytest.raises(TableTooLarge, match="the limit is 134,217,728") as caught:
        log_partition(FactorGraph(factors, dict.fromkeys(names, ())))
    assert caught.value.size == 4**40
    assert set(caught.value.variables) == set(names)
    assert time.perf_counter() - started < 5


@pytest.mark.parametrize(
    ("scopes", "variables", "message"),
    [
        ({"a": (2,), "ba": (2, 3)}, {"a": (), "b": ()}, "2 values in one factor and 3"),
        ({"a": (2,)}, {"a": (), "b": ()}, "no factor mentions b"),
        ({"a": (2,), "ia": (3, 2)}, {"a": ("i",)}, "lives in plate i"),
    ],
)
def test_contradictory_graphs_are_refused(scopes: dict, variables: dict, message: str) -> None:
    factors = tuple(Factor(tuple(names), torch.zeros(shape)) for names, shape in scopes.items())
    with pytest.raises(ValueError, match=message):
        log_partition(FactorGraph(factors, variables))


def test_names_must_match_dimensions() -> None:
    with pytest.raises(ValueError, match="one distinct name per dimension"):
        Factor(("a", "a"), torch.zeros(2, 2))


def chain(length: int, states: int = 3) -> FactorGraph:
    generator = torch.Generator().manual_seed(length)
    pairs = torch.randn(length - 1, states, states, dtype=torch.float64, generator=generator)
    first = Factor(("x0",), torch.zeros(states, dtype=torch.float64))
    return FactorGraph(
        (first, *(Factor((f"x{t}", f"x{t + 1}"), pairs[t]) for t in range(length - 1))),
        {f"x{t}": () for t in range(length)},
    )


def test_a_long_chain_equals_the_forward_algorithm() -> None:
    graph = chain(1000)
    message = torch.zeros(3, dtype=torch.float64)
    for factor in graph.factors[1:]:
        message = (message[:, None] + factor.log).logsumexp(0)
    torch.testing.assert_close(log_partition(graph), message.logsumexp(0))
    assert sample(graph, 7)["x999"].shape == (7,)


def test_time_is_linear_in_the_length_of_a_chain() -> None:
    def seconds(length: int) -> float:
        graph, best = chain(length), float("inf")
        for attempt in range(3):
            started = time.process_time()
            # Another limit is another plan: planning is measured too.
            log_partition(graph, max_table=1000 + attempt)
            best = min(best, time.process_time() - started)
        return best

    short, long = seconds(500), seconds(4000)
    assert long / short < 24, f"8 times the length took {long / short:.1f} times as long"


def test_order_of_a_hidden_chain_never_joins_two_steps() -> None:
    scopes = [(f"x{t}", f"x{t + 1}") for t in range(50)] + [(f"x{t}", f"y{t}") for t in range(50)]
    names = list(dict.fromkeys(name for scope in scopes for name in scope))
    neighbours = moral_neighbours(scopes)
    for name in elimination_order(scopes, dict.fromkeys(names, 4), names):
        others = neighbours.pop(name)
        assert len(others) <= 1
        for other in others:
            neighbours[other].discard(name)


def test_colouring_separates_neighbours_with_two_colours_on_a_chain() -> None:
    scopes = [(f"x{t}", f"x{t + 1}") for t in range(100)]
    neighbours = moral_neighbours(scopes)
    colours = colouring(neighbours)
    assert set(colours.values()) == {0, 1}
    assert all(colours[name] != colours[other] for name, others in neighbours.items() for other in others)
