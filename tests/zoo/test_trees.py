"""Trees of binary variables: they are laws, Chow-Liu's is the best of all, and mixtures of them are summed out."""

import itertools

import pytest
import torch

from pgen import Run, fit
from pgen.errors import DataError, OptionError
from pgen.testing.statistics import StatisticalFailure, assert_frequencies
from pgen.zoo import MaskedAutoencoder, Tree, TreeMixture, chow_liu

SIZE = 5
EVERY = torch.tensor(list(itertools.product([0.0, 1.0], repeat=SIZE)))  # [32, 5]
CODE = torch.tensor([16.0, 8, 4, 2, 1])
SHAPES = {
    "none": [-1, -1, -1, -1, -1],
    "chain": [1, 2, 3, 4, -1],
    "star": [-1, 0, 0, 0, 0],
    "forest": [-1, 0, 3, -1, 2],
}


def tree(name):
    return Tree(torch.randn(SIZE, 2, generator=torch.Generator().manual_seed(0)), torch.tensor(SHAPES[name]))


@pytest.mark.parametrize("name", SHAPES)
def test_a_tree_is_a_law_and_draws_from_it(name):
    law = tree(name)
    p = law.log_prob(EVERY).exp()
    assert abs(float(p.sum()) - 1) < 1e-5
    torch.manual_seed(1)
    drawn = (law.sample((20_000,)) @ CODE).long()
    assert_frequencies(drawn, p)
    with pytest.raises(StatisticalFailure):
        assert_frequencies(drawn, p.flip(0))


def test_log_probabilities_are_products_of_conditionals():
    law, x = tree("forest"), EVERY[19]
    expected = 0.0
    for i, parent in enumerate(SHAPES["forest"]):
        logit = law.logits[i, int(x[parent])] if parent >= 0 else law.logits[i, 0]
        expected += float(torch.distributions.Bernoulli(logits=logit).log_prob(x[i]))
    assert abs(float(law.log_prob(x)) - expected) < 1e-5


def test_circles_and_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match="parents"):
        Tree(torch.zeros(2, 2), torch.tensor([1, 0]), validate_args=True)
    with pytest.raises(OptionError, match="expected"):
        Tree(torch.zeros(2, 3), torch.tensor([-1, 0]))
    with pytest.raises(OptionError, match="smoothing"):
        chow_liu(EVERY, smoothing=0)
    with pytest.raises(DataError, match="zeros and ones"):
        chow_liu(EVERY * 2)


def test_chow_lius_tree_is_the_best_of_all():
    torch.manual_seed(2)
    x = tree("chain").sample((500,))[:, :4]
    best = float(chow_liu(x, smoothing=1e-9).log_prob(x).sum())
    others = []
    for parents in itertools.product(range(-1, 4), repeat=4):
        try:
            law = Tree(torch.zeros(4, 2), torch.tensor(parents), validate_args=True)
        except ValueError:
            continue
        logits = torch.zeros(4, 2)
        for i, p in enumerate(parents):
            for v in (0, 1):
                rows = x[:, i] if p < 0 else x[x[:, p] == v, i]
                logits[i, v] = rows.mean().clamp(1e-7, 1 - 1e-7).logit() if len(rows) else 0.0
        others.append(float(Tree(logits, law.parents).log_prob(x).sum()))
    assert len(others) > 100
    assert best >= max(others) - 1e-2


def test_weights_count_rows():
    x = EVERY[torch.tensor([0, 31, 5, 9])]
    twice = chow_liu(torch.cat([x, x[:2]]))
    weighted = chow_liu(x, weights=torch.tensor([2.0, 2.0, 1.0, 1.0]))
    torch.testing.assert_close(twice.log_prob(EVERY), weighted.log_prob(EVERY))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fitted_models_sum_to_one_over_all_values(dtype):
    torch.manual_seed(3)
    x = torch.cat([tree("chain").sample((150,)), tree("star").sample((150,))])
    run = Run(steps=30, lr=0.05, progress=False, precision="float64" if dtype is torch.float64 else None)
    mixture = fit(TreeMixture(SIZE, 3, [chow_liu(x[i::3]) for i in range(3)]), {"x": x}, "exact", run=run)
    masked = fit(MaskedAutoencoder(SIZE, 2, 16, 0.1, order=torch.randperm(SIZE)), {"x": x}, "exact", run=run)
    for fitted in (mixture, masked):
        total = fitted.log_prob({"x": EVERY.to(dtype)}).value.double().exp().sum()
        assert abs(float(total) - 1) < (1e-5 if dtype is torch.float32 else 1e-10)


def test_a_mixture_sums_its_component_out_and_asks_for_as_many_trees():
    torch.manual_seed(4)
    mixture = TreeMixture(SIZE, 2, [tree("chain"), tree("star")])
    fitted = fit(mixture, {"x": EVERY}, "exact", run=Run(steps=0, progress=False))
    expected = torch.stack([tree("chain").log_prob(EVERY), tree("star").log_prob(EVERY)]).logsumexp(0)
    torch.testing.assert_close(fitted.log_prob({"x": EVERY}).value, expected - torch.tensor(2.0).log())
    with pytest.raises(OptionError, match="got 1 trees"):
        TreeMixture(SIZE, 2, [tree("chain")])
