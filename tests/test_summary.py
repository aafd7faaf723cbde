"""Summaries: numbers that are those of the draws, warnings where something is wrong, silence where nothing is."""

import re

import pytest
import torch

from pgen.advice import Evidence, coordinate, divergent_place, groups_of_chains
from pgen.draws import Draws
from pgen.errors import OptionError
from pgen.metrics.chains import diagnose


@pytest.fixture
def noise():
    return torch.Generator().manual_seed(0)


def chains(noise, count=4, draws=1000, *event):
    return torch.randn(count, draws, *event, generator=noise, dtype=torch.float64)


def summary(sites, stats=None, chains=4, **more):
    """Of tensors `[chains, draws, ...]`."""
    stats = {"acceptance_rate": torch.full(next(iter(sites.values())).shape[:2], 0.8)} | (stats or {})
    return Draws(
        {k: v.flatten(0, 1) for k, v in sites.items()},
        chains=chains,
        stats={k: v.flatten(0, 1) for k, v in stats.items()},
        **more,
    ).summary()


# --- numbers ---


def test_rows_are_the_numbers_of_the_draws(noise):
    x, w = chains(noise), chains(noise, 4, 1000, 2, 3)
    found = summary({"x": x, "w": w})
    assert [r.name for r in found][:3] == ["x", "w[0, 0]", "w[0, 1]"]
    assert len(found) == len(found.rows) == 7
    row, exact = found["w[1, 2]"], diagnose(w[..., 1, 2])
    assert row.mean == pytest.approx(float(w[..., 1, 2].mean()))
    assert row.sd == pytest.approx(float(w[..., 1, 2].std()))
    assert row.quantiles[0.05] == pytest.approx(float(w[..., 1, 2].quantile(0.05)))
    assert (row.ess_bulk, row.ess_tail, row.r_hat, row.mcse_mean) == pytest.approx(
        [float(v) for v in (exact.ess_bulk, exact.ess_tail, exact.r_hat, exact.mcse_mean)]
    )
    assert found["x"].site == "x"
    with pytest.raises(KeyError, match="rows are called x, w"):
        found["v"]


def test_quantiles_as_asked(noise):
    draws = Draws({"x": chains(noise).flatten()}, chains=4)
    assert list(draws.summary((0.1, 0.9))["x"].quantiles) == [0.1, 0.9]
    assert "10 %" in str(draws.summary((0.1, 0.9)))
    assert draws.summary(())["x"].quantiles == {}
    with pytest.raises(OptionError, match="expected probabilities"):
        draws.summary((5, 95))


def test_prints_numbers_to_their_error(noise):
    text = str(summary({"mu": 1000 + 0.01 * chains(noise), "n[": 1e-9 * chains(noise)}))
    assert "4 chains of 1,000 draws" in text
    assert re.search(r"(999|1000)\.\d{4,5}\b", text)
    assert "e+03" not in text
    assert "n[" in text  # not taken for markup


def test_long_sites_show_their_worst_and_say_what_they_leave_out(noise):
    theta = chains(noise, 4, 250, 500)
    theta[:2, :, 321] += 3.0
    text = str(summary({"mu": chains(noise, 4, 250), "theta": theta}))
    assert "theta[321]" in text
    assert "more, none worse" in text
    assert len(text.splitlines()) < 40
    many = str(summary({f"x{i}": chains(noise, 4, 50) for i in range(60)}))
    assert "20 more sites" in many


def test_draws_that_are_over_are_counted():
    found = Draws({"x": torch.randn(103)}, chains=4).summary()
    assert (found.chains, found.draws, found.left_out) == (4, 25, 3)
    assert "3 left out" in str(found)


def test_too_few_draws_for_a_judgement():
    found = Draws({"x": torch.tensor([1.0, 2.0])}, chains=2).summary()
    assert found["x"].mean == 1.5
    assert "-" in str(found)
    assert Draws({}).summary().rows == ()


# --- silence ---


@pytest.mark.parametrize("shape", [(4, 1000), (4, 400), (64, 50), (512, 20)], ids=str)
def test_good_chains_are_not_warned_of(shape, noise):
    """200 coordinates, the greatest R-hat of which often passes 1.01; a warning comes once in a thousand times."""
    x = chains(noise, *shape, 200)
    for t in range(1, shape[1]):  # a little memory
        x[:, t] = 0.3 * x[:, t - 1] + (1 - 0.09) ** 0.5 * x[:, t]
    stats = {"diverging": torch.zeros(shape), "energy": chains(noise, *shape), "lp": chains(noise, *shape)}
    found = summary({"x": x}, stats, chains=shape[0])
    assert found.warnings == ()
    if shape != (4, 1000):
        assert max(r.r_hat for r in found) > 1.01


def test_independent_draws_have_no_chains_to_warn_of():
    assert Draws({"z": torch.randn(50, 3)}).summary().warnings == ()


def test_parts_that_are_constant_by_their_support(noise):
    cholesky = chains(noise, 4, 1000, 2, 2)
    cholesky[..., 0, 1] = 0.0
    found = summary(
        {"L": cholesky, "k": torch.full((4, 1000), 2.0), "one": torch.full((4, 1000, 2), 0.3)[..., :0]}
    )
    assert found.warnings == ()
    assert (found["k"].mean, found["k"].sd) == (2.0, 0.0)
    assert "-" in str(found)


# --- warnings ---


def only(found, start):
    assert len(found.warnings) == 1, found.warnings
    assert found.warnings[0].startswith(start), found.warnings[0]
    return found.warnings[0]


def test_divergences_are_located(noise):
    tau, theta = chains(noise).exp(), chains(noise, 4, 1000, 3)
    flags = (tau < 0.1) & (torch.rand(4, 1000, generator=noise) < 0.5)
    said = only(
        summary({"theta": theta, "tau": tau}, {"diverging": flags}), f"{int(flags.sum())} of 4,000 draws"
    )
    assert ", near small tau (half of them below its " in said
    assert "LocScaleReparam" in said
    said = summary({"theta": theta, "tau": -tau}, {"diverging": flags}).warnings[0]
    assert ", near large tau (half of them above its " in said


def test_divergences_anywhere_are_not_located(noise):
    """By chance one in a thousand is: of 200 specimens, more than 5 would be with probability 1e-8."""
    located = 0
    for _ in range(200):
        x = {"x": chains(noise, 4, 100, 10)}
        e = Evidence(x, {}, {"x": diagnose(x["x"])})
        located += divergent_place(e, torch.rand(4, 100, generator=noise) < 0.1) is not None
    assert located <= 5


def test_modes_are_told_apart(noise):
    theta = chains(noise, 4, 1000, 5)
    theta[0, :, 3] += 10.0
    lp = -0.5 * chains(noise).square()
    said = only(summary({"theta": theta}, {"lp": lp}), "R-hat of theta[3] is ")
    assert "1 of 5 coordinates are above 1.01" in said
    assert "2 groups (modes)" in said
    assert "3 chains near theta[3] = " in said
    assert re.search(r"1 chain near theta\[3\] = (10|9\.9)", said)
    assert "tempered" in said
    lp[0] -= 50.0
    assert "local mode" in only(summary({"theta": theta}, {"lp": lp}), "R-hat")


def test_switched_labels_are_told_from_modes(noise):
    """Four chains, each with the same three components in another order; then one that lacks a component."""
    centres = torch.tensor([[0.0, 5, 10], [5, 0, 10], [10, 5, 0], [0, 10, 5]])
    x = chains(noise, 4, 1000, 3) + centres[:, None]
    said = only(summary({"m": x, "s": chains(noise)}), "R-hat of m[")
    assert "Labels are switched: put in order, the elements of m agree" in said
    x[3] = x[3] + torch.tensor([0.0, 0, 5])
    assert not any("Labels" in w for w in summary({"m": x, "s": chains(noise)}).warnings)
    apart = chains(noise) + 9 * (torch.arange(4) < 2)[:, None]  # what is no element of anything has two modes
    assert not any("Labels" in w for w in summary({"m": x, "s": apart}).warnings)


def test_chains_that_drift_are_no_modes(noise):
    walk = chains(noise).cumsum(1)
    said = summary({"x": walk}).warnings
    assert not any("modes" in w for w in said)
    assert any(w.startswith(("R-hat of x", "Bulk ESS of x", "Tail ESS of x")) for w in said)


def test_groups():
    x = torch.randn(6, 200, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert groups_of_chains(x) is None
    x[[1, 4]] += 8.0
    x[2] = 30.0  # stuck: in no group
    assert groups_of_chains(x) == [
        sorted([0, 3, 5], key=lambda c: x[c].mean()),
        sorted([1, 4], key=lambda c: x[c].mean()),
    ]
    assert groups_of_chains(x + 20 * torch.arange(6)[:, None]) is None  # as many groups as chains


def test_few_effective_draws_say_how_many_would_do(noise):
    slow = chains(noise, 4, 1000)
    for t in range(1, 1000):
        slow[:, t] = 0.95 * slow[:, t - 1] + (1 - 0.95**2) ** 0.5 * slow[:, t]
    found = summary({"x": chains(noise), "slow": slow})
    said = next(w for w in found.warnings if "ESS" in w)
    least = min(found["slow"].ess_bulk, found["slow"].ess_tail)
    assert f"ESS of slow is {least:.0f} of 4,000 draws (1 of 2 coordinates are below 400)" in said
    needed = int(said.split("About ")[1].split(" draws")[0].replace(",", ""))
    assert 1.0 <= needed / (4000 * 400 / least) < 1.11


def test_energies(noise):
    energy = chains(noise).cumsum(1)
    assert "E-BFMI is 0.0" in only(summary({"x": chains(noise)}, {"energy": energy}), "E-BFMI")
    one = chains(noise)
    one[2] = 30 * energy[2]
    assert "in chain 2" in only(summary({"x": chains(noise)}, {"energy": one}), "E-BFMI")
    # A kernel without momenta reports minus the log density.
    assert summary({"x": chains(noise)}, {"energy": energy, "lp": -energy}).warnings == ()


def test_stuck_chains(noise):
    x, rate = chains(noise, 4, 1000, 2), torch.full((4, 1000), 0.8)
    x[1], rate[1] = 0.5, 0.0
    found = summary({"x": x}, {"acceptance_rate": rate})
    assert found.warnings[0].startswith("chain 1 never moved (acceptance 0.00)")
    rate[2:] = 0.01
    assert "chains 2 and 3 hardly moved" in summary({"x": x}, {"acceptance_rate": rate}).warnings[1]


def test_one_chain(noise):
    said = only(summary({"x": chains(noise, 1)}, chains=1), "one chain only")
    assert "at least 4" in said


def test_tree_depth(noise):
    deep = torch.rand(4, 1000, generator=noise) < 0.3
    assert "greatest tree depth" in only(summary({"x": chains(noise)}, {"reached_max_treedepth": deep}), "3")
    assert summary({"x": chains(noise)}, {"reached_max_treedepth": deep & False}).warnings == ()


def test_values_that_are_wrong(noise):
    bad = chains(noise)
    bad[0, 3] = torch.nan
    assert "1 of 4,000 draws of bad are not finite" in summary({"bad": bad, "x": chains(noise)}).warnings[0]
    still = torch.full((4, 1000), 0.37)
    assert "still has the same value" in only(summary({"still": still, "x": chains(noise)}), "still")
    weighted = Draws({"z": torch.randn(100)}, khat=torch.tensor([0.3, 0.9])).summary()
    assert "k-hat of the importance weights is 0.90" in only(weighted, "k-hat")


def test_names_of_coordinates():
    assert [coordinate("w", i, (2, 2)) for i in range(4)] == ["w[0, 0]", "w[0, 1]", "w[1, 0]", "w[1, 1]"]
    assert coordinate("a", 0, ()) == "a"
