"""Orders in which to sum variables out of a product of factors, and colourings of the graph behind them.

Both problems are NP-hard; both have greedy answers that are exact on trees and chains and close to the best
known elsewhere. Everything here is near-linear in the size of a graph of bounded degree: a chain of a
hundred thousand variables is ordered in seconds.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from math import exp, log
from typing import TypeVar

Name = TypeVar("Name", bound=Hashable)

#: Above this degree the fill-in of a vertex is bounded by its number of pairs instead of being counted.
_COUNTED_DEGREE = 64
#: Largest exponent of a float; tables beyond it are all equally hopeless.
_OVERFLOW = 700.0


def moral_neighbours(scopes: Iterable[Collection[Name]]) -> dict[Name, set[Name]]:
    """Join every two names that share a scope; the result maps a name to its neighbours.

    >>> {name: sorted(others) for name, others in moral_neighbours(["ab", "bc"]).items()}
    {'a': ['b'], 'b': ['a', 'c'], 'c': ['b']}
    """
    neighbours: dict[Name, set[Name]] = {}
    for scope in scopes:
        for name in scope:
            neighbours.setdefault(name, set()).update(scope)
    for name, others in neighbours.items():
        others.discard(name)
    return neighbours


def colouring(neighbours: Mapping[Name, Collection[Name]]) -> dict[Name, int]:
    """Give adjacent names different colours, few of them: first fit in the order of the mapping.

    In program order each vertex of a Markov chain sees only its predecessor, so a chain needs two colours
    however long it is.

    >>> colouring({"a": ["b"], "b": ["a", "c"], "c": ["b"]})
    {'a': 0, 'b': 1, 'c': 0}
    """
    colours: dict[Name, int] = {}
    for name, others in neighbours.items():
        taken = {colours[other] for other in others if other in colours}
        colours[name] = next(colour for colour in range(len(taken) + 1) if colour not in taken)
    return colours


def chains_of(scopes: Iterable[Collection[str]], inner: Collection[str]) -> list[list[str]]:
    """Paths in which every name but the two ends is in `inner`, and meets only the one before and the one after.

    >>> chains_of(["ab", "bc", "cd", "b", "de", "df"], "bcd")
    [['a', 'b', 'c', 'd']]
    """
    scopes = [frozenset(scope) for scope in scopes]
    neighbours = moral_neighbours(scopes)
    crowded = {name for scope in scopes if len(scope) > 2 for name in scope}
    passed = {name for name in inner if name not in crowded and len(neighbours.get(name, ())) == 2}
    found: list[list[str]] = []
    done: set[str] = set()
    for name in inner:
        if name not in passed or name in done:
            continue
        chain = [name]
        done.add(name)
        for end in (0, -1):  # from there in both directions
            while (here := chain[end]) in passed:
                ahead = [other for other in neighbours[here] if other not in chain[:2] + chain[-2:]]
                if not ahead:
                    break
                following = min(ahead)
                done.add(following)
                chain.insert(0 if end == 0 else len(chain), following)
        if chain[0] not in passed and chain[-1] not in passed:  # not a ring
            found.append(chain)
    return found


def elimination_order(
    scopes: Sequence[Collection[str]], sizes: Mapping[str, int], eliminate: Collection[str]
) -> list[str]:
    r"""Order in which to sum `eliminate` out of factors with the given scopes; names not in it stay.

    Summing out v multiplies the factors that mention v into a table over v and its neighbours N(v), and
    joins those neighbours. Two greedy rules are tried, and the one whose tables hold fewer numbers in
    total, \(\sum_v \prod_{u \in \{v\} \cup N(v)} |u|\), is kept:

    - min-weight: the smallest table next;
    - min-fill: the fewest new edges next, ties by table size.

    Args:
        scopes: names in each factor.
        sizes: number of values of each name.
        eliminate: the names to sum out, all of which must occur in `sizes`.

    Source: Kjaerulff 1990, "Triangulation of graphs: algorithms giving small total state space".

    >>> elimination_order(["ab", "bc", "cd"], dict.fromkeys("abcd", 2), "abcd")
    ['a', 'b', 'c', 'd']
    """
    position = {name: i for i, name in enumerate(dict.fromkeys(eliminate))}
    candidates = [_greedy(scopes, sizes, position, rule) for rule in (_by_weight, _by_fill)]
    return min(candidates, key=lambda candidate: candidate[1])[0]


_Graph = dict[str, set[str]]


def _by_weight(graph: _Graph, name: str, weight: float) -> tuple[float, float]:
    return weight, 0.0


def _by_fill(graph: _Graph, name: str, weight: float) -> tuple[float, float]:
    others = graph[name]
    degree = len(others)
    if degree > _COUNTED_DEGREE:
        return degree * (degree - 1) / 2, weight
    # Each missing pair is seen from both ends; a vertex is never its own neighbour, hence the - 1.
    return sum(len(others - graph[other]) - 1 for other in others) / 2, weight


def _greedy(
    scopes: Sequence[Collection[str]],
    sizes: Mapping[str, int],
    position: Mapping[str, int],
    rule: Callable[[_Graph, str, float], tuple[float, float]],
) -> tuple[list[str], float]:
    graph = moral_neighbours([tuple(dict.fromkeys(scope)) for scope in scopes])
    for name in position:
        graph.setdefault(name, set())
    bits = {name: log(sizes[name]) for name in graph}
    weights = {name: bits[name] + sum(bits[other] for other in others) for name, others in graph.items()}

    # An entry of the heap goes stale when a neighbour is eliminated: a fresh one is pushed, the old skipped.
    current = {name: rule(graph, name, weights[name]) for name in position}
    heap = [(key, position[name], name) for name, key in current.items()]
    heapq.heapify(heap)
    order: list[str] = []
    total = 0.0
    while heap:
        key, _, name = heapq.heappop(heap)
        if current.get(name) != key:
            continue
        del current[name]
        order.append(name)
        total += exp(min(weights[name], _OVERFLOW))
        others = graph.pop(name)
        for other in others:
            joined = others - graph[other]
            joined.discard(other)
            graph[other] |= joined
            graph[other].discard(name)
            weights[other] += sum(bits[new] for new in joined) - bits[name]
        for other in others:
            if other in current:
                current[other] = rule(graph, other, weights[other])
                heapq.heappush(heap, (current[other], position[other], other))
    return order, total
