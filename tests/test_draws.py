"""Draws: a mapping of tensors, by chain where that is asked, and as ArviZ has them."""

import pytest
import torch

from pgen.draws import Draws

N = 40


@pytest.fixture
def draws():
    return Draws(
        {"mu": torch.arange(N).double(), "w": torch.randn(N, 2, 3)},
        chains=4,
        stats={"diverging": torch.zeros(N, dtype=torch.bool), "energy": torch.randn(N)},
        log_likelihood={"y": torch.randn(N, 5)},
    )


def test_a_mapping(draws):
    assert list(draws) == ["mu", "w"]
    assert len(draws) == 2
    assert draws["w"].shape == (N, 2, 3)


def test_chains_lie_one_after_another(draws):
    found = draws.by_chain()
    assert found["w"].shape == (4, 10, 2, 3)
    assert found["mu"][1].tolist() == list(range(10, 20))


@pytest.mark.parametrize(("n", "chains"), [(7, 3), (40, 7), (3, 5), (1, 1), (10, 10)])
def test_what_is_over_is_left_out_at_the_end_of_chains(n, chains):
    found = Draws({"x": torch.arange(n)}, chains=chains).by_chain()["x"]
    chains = min(chains, n)
    assert found.shape == (chains, n // chains)
    assert bool((found.diff(dim=-1) == 1).all())
    longer = n % chains
    starts = [c * (n // chains) + min(c, longer) for c in range(chains)]
    assert found[:, 0].tolist() == starts


def test_to_arviz(draws):
    pytest.importorskip("arviz_base", reason="needs arviz-base: pip install 'pgen-ppl[diagnostics]'")
    tree = draws.to_arviz(
        observed={"y": torch.zeros(5)},
        predictive={"y": torch.randn(N, 5)},
        dims={"w": ["row", "column"]},
        coords={"column": ["a", "b", "c"]},
    )
    groups = {"posterior", "sample_stats", "log_likelihood", "observed_data", "posterior_predictive"}
    assert {g.strip("/") for g in tree.groups} - {""} == groups
    assert tree["posterior"]["w"].dims == ("chain", "draw", "row", "column")
    assert tree["posterior"]["column"].values.tolist() == ["a", "b", "c"]
    for group in ("log_likelihood", "posterior_predictive"):
        assert tree[group]["y"].dims == ("chain", "draw", "y_dim_0")
    assert tree["observed_data"]["y"].dims == ("y_dim_0",)
    assert tree["sample_stats"]["diverging"].dtype == bool
    assert tree["posterior"]["mu"].values[1].tolist() == list(range(10, 20))


def test_only_groups_that_are_known_are_there():
    pytest.importorskip("arviz_base", reason="needs arviz-base: pip install 'pgen-ppl[diagnostics]'")
    tree = Draws({"x": torch.randn(7)}, chains=2).to_arviz()
    assert [g for g in tree.groups if g != "/"] == ["/posterior"]
    assert tree["posterior"]["x"].shape == (2, 3)


def test_summary_is_that_of_the_tree(draws):
    """What ArviZ computes from the exported groups: nothing is lost or reordered on the way."""
    pytest.importorskip("arviz_base", reason="needs arviz-base: pip install 'pgen-ppl[diagnostics]'")
    array = pytest.importorskip("arviz_stats.base", reason="needs arviz-stats").array_stats
    posterior = draws.to_arviz()["posterior"]
    for row in draws.summary():
        site, _, index = row.name.rstrip("]").partition("[")
        place = tuple(int(i) for i in index.split(",")) if index else ()
        x = posterior[site].values[(slice(None), slice(None), *place)].astype(float)
        theirs = (array._rhat_rank(x), array._ess_bulk(x), array._ess_tail(x, 0.05), x.mean())
        assert (row.r_hat, row.ess_bulk, row.ess_tail, row.mean) == pytest.approx(theirs, rel=1e-6)
