"""Trees of binary variables: they are laws, Chow-Liu's is the likeliest, and mixtures of them are summed out."""

import itertools
import math

import networkx as nx
import pytest
import torch

from pgen import Run, fit
from pgen.errors import DataError, OptionError
from pgen.testing.statistics import StatisticalFailure, assert_frequencies
from pgen.zoo import MaskedAutoencoder, Tree, TreeMixture, chow_liu

SIZE = 5
EVERY = torch.tensor(list(itertools.product([0.0, 1.0], repeat=SIZE)), dtype=torch.float64)
CODE = 2 ** torch.arange(SIZE - 1, -1, -1)
SHAPES = {
    "none": [-1, -1, -1, -1, -1],
    "chain": [1, 2, 3, 4, -1],
    "star": [-1, 0, 0, 0, 0],
    "forest": [-1, 0, 3, -1, 2],
}


def tree(shape):
    return Tree(torch.randn(SIZE, 2, dtype=torch.float64), torch.tensor(SHAPES[shape]))


def dependent(rows, size, seed, flip=0.15):
    """Bits each of which is an earlier one, or the exclusive or of two, some of them flipped."""
    generator = torch.Generator().manual_seed(seed)
    x = (torch.rand(rows, size, generator=generator) < 0.4).float()
    for i in range(1, size):
        a, b = (int(torch.randint(0, i, (), generator=generator)) for _ in range(2))
        told = x[:, a] if i % 2 else (x[:, a] + x[:, b]) % 2
        wrong = torch.rand(rows, generator=generator) < flip
        x[:, i] = torch.where(wrong, 1 - told, told)
    return x


@pytest.mark.parametrize("shape", list(SHAPES))
def test_the_probability_of_a_row_is_the_product_of_its_conditionals(shape):
    law = tree(shape)
    for row, score in zip(EVERY, law.log_prob(EVERY), strict=True):
        product = 1.0
        for i, parent in enumerate(SHAPES[shape]):
            one = law.logits[i, int(row[parent]) if parent >= 0 else 0].sigmoid()
            product *= float(one if row[i] == 1 else 1 - one)
        assert float(score.exp()) == pytest.approx(product, rel=1e-12)


@pytest.mark.parametrize("shape", list(SHAPES))
def test_draws_have_the_probabilities(shape):
    law = tree(shape)
    codes = (law.sample((20_000,)).long() * CODE).sum(-1)
    assert_frequencies(codes, law.log_prob(EVERY).exp())


def test_draws_of_another_tree_are_noticed():
    """The check above can fail: a link turned round, which changes the law."""
    law = Tree(torch.tensor([[-1.0, 0], [-1, 1], [0, 0], [0, 0], [0, 0]]), torch.tensor([-1, 0, -1, -1, -1]))
    other = Tree(law.logits, torch.tensor([-1, -1, -1, -1, -1]))
    with pytest.raises(StatisticalFailure):
        assert_frequencies((other.sample((20_000,)).long() * CODE).sum(-1), law.log_prob(EVERY).exp())


def test_a_batch_may_hold_trees_of_different_shapes():
    laws = [tree(shape) for shape in SHAPES]
    batch = Tree(torch.stack([t.logits for t in laws]), torch.stack([t.parents for t in laws]))
    assert batch.batch_shape == (4,)
    assert batch.sample((3, 2)).shape == (3, 2, 4, SIZE)
    scores = batch.log_prob(EVERY[:, None])
    torch.testing.assert_close(scores, torch.stack([t.log_prob(EVERY) for t in laws], -1))
    wide = laws[1].expand((6,))
    assert wide.sample().shape == (6, SIZE)
    torch.testing.assert_close(wide.log_prob(EVERY[0]), laws[1].log_prob(EVERY[0]).expand(6))


def test_what_is_no_forest_is_refused():
    for parents in ([1, 2, 0], [0, -1, -1], [-1, 3, 0], [-2, 0, 0]):
        with pytest.raises(ValueError, match="parents"):
            Tree(torch.zeros(3, 2), torch.tensor(parents), validate_args=True)
    with pytest.raises(OptionError, match="expected"):
        Tree(torch.zeros(3, 2), torch.tensor([-1, 0]))
    with pytest.raises(OptionError, match="got 1 trees"):
        TreeMixture(SIZE, 2, [tree("star")])


def information(x, smoothing):
    """Mutual information of every pair, from its smoothed table, one pair at a time."""
    edges = nx.Graph()
    for i, j in itertools.combinations(range(x.shape[1]), 2):
        table = torch.full((2, 2), smoothing, dtype=torch.float64)
        for a, b in itertools.product((0, 1), repeat=2):
            table[a, b] += ((x[:, i] == a) & (x[:, j] == b)).sum()
        table /= table.sum()
        apart = table.sum(1, keepdim=True) * table.sum(0, keepdim=True)
        edges.add_edge(i, j, weight=float((table * (table / apart).log()).sum()))
    return edges


def test_chow_liu_spans_the_most_information(seed):
    x = dependent(300, 8, seed)
    found, edges = chow_liu(x, 0.5), information(x, 0.5)
    links = {(min(i, p), max(i, p)) for i, p in enumerate(found.parents.tolist()) if p >= 0}
    best = nx.maximum_spanning_tree(edges)
    assert len(links) == 7
    reached = sum(edges.edges[link]["weight"] for link in links)
    assert reached == pytest.approx(best.size(weight="weight"), rel=1e-9)


def test_chow_liu_is_the_likeliest_of_all_trees(seed):
    """On four variables all 16 trees can be tried; entropies less information is what the rows score."""
    x = dependent(200, 4, seed).double()
    found = float(chow_liu(x, 1e-9).log_prob(x).mean())
    edges = information(x, 1e-9)
    shares = x.mean(0)
    alone = float((shares * shares.log() + (1 - shares) * (1 - shares).log()).sum())
    trees = [edges.edge_subgraph(three) for three in itertools.combinations(edges.edges, 3)]
    scores = [alone + t.size(weight="weight") for t in trees if len(t) == 4 and nx.is_tree(t)]
    assert len(scores) == 16
    assert found == pytest.approx(max(scores), abs=1e-6)
    assert found - min(scores) > 1e-3


def test_weights_of_rows_are_repetitions():
    x = dependent(60, 6, 3).double()
    times = torch.arange(60) % 3
    weighted, repeated = chow_liu(x, 0.5, times), chow_liu(x.repeat_interleave(times, 0), 0.5)
    assert torch.equal(weighted.parents, repeated.parents)
    torch.testing.assert_close(weighted.logits, repeated.logits)


def test_chow_liu_says_what_it_expects():
    with pytest.raises(DataError, match="zeros and ones"):
        chow_liu(torch.full((4, 3), 2.0))
    with pytest.raises(OptionError, match="smoothing"):
        chow_liu(torch.zeros(4, 3), 0.0)


def test_one_tree_is_already_at_its_maximum(seed):
    x = dependent(400, 6, seed).double()
    found = chow_liu(x, 1e-6)
    fitted = fit(TreeMixture(6, 1, [found]), {"x": x}, "exact", run=Run(progress=False))
    assert float(fitted.log_prob({"x": x}).value.mean()) == pytest.approx(
        float(found.log_prob(x).mean()), abs=1e-6
    )


def test_a_mixture_follows_what_one_tree_cannot(seed):
    """Two chains of opposite sign: neighbours are dependent in each, independent in both together.

    Divergences are sums over all values. Of a fit of 19 numbers to 2,000 rows, 4,000 times the divergence is
    chi-square of 19 degrees of freedom, and exceeds 80 once in 10^8 times.
    """
    link = torch.tensor([[0.0, 0], *[[-3.0, 3]] * (SIZE - 1)], dtype=torch.float64)
    halves = [Tree(sign * link, torch.tensor([-1, 0, 1, 2, 3])) for sign in (-1, 1)]
    truth = torch.stack([half.log_prob(EVERY) for half in halves]).logsumexp(0) - math.log(2)

    def divergence(scores):
        return float((truth.exp() * (truth - scores)).sum())

    x = torch.cat([half.sample((1000,)) for half in halves])
    start = [chow_liu(rows[:200], 1.0) for rows in x.split(1000)]
    run = Run(steps=300, batch_size=256, lr=0.03, progress=False)
    fitted = fit(TreeMixture(SIZE, 2, start), {"x": x}, "exact", run=run, seed=seed)
    assert divergence(fitted.log_prob({"x": EVERY}).value) < 80 / 4000
    likeliest = chow_liu(EVERY, 1e-12, truth.exp())
    assert divergence(likeliest.log_prob(EVERY)) > 0.1


@pytest.mark.parametrize(("precision", "tolerance"), [("float64", 1e-12), ("float32", 1e-5)])
@pytest.mark.parametrize(
    "program",
    [
        lambda: TreeMixture(10, 4),
        lambda: MaskedAutoencoder(10, 2, hidden=16, dropout=0.2, order=torch.randperm(10)),
    ],
    ids=["trees", "masked"],
)
def test_the_probabilities_of_all_values_add_up_to_one(program, precision, tolerance, seed):
    run = Run(steps=100, lr=0.02, precision=precision, progress=False)
    fitted = fit(program(), {"x": dependent(500, 10, seed)}, "exact", run=run, seed=seed)
    dtype = getattr(torch, precision)
    every = (torch.arange(2**10)[:, None] >> torch.arange(10) & 1).to(dtype)
    score = fitted.log_prob({"x": every}).value
    assert score.dtype == dtype
    assert float(score.double().exp().sum()) == pytest.approx(1.0, abs=tolerance)
    assert abs(float(score[1:].double().exp().sum()) - 1.0) > tolerance  # one left out is noticed
