"""How sites are learned: memories are made from the data, kept, and looked at; held-out losses that mean nothing choose nothing."""

import math

import pyro
import pytest
import torch
from torch import nn
from torch.distributions import constraints

import pgen
from pgen.algorithms.energy.contrastive import PersistentContrastiveDivergence
from pgen.choice import answering, learning
from pgen.distributions import Energy
from pgen.distributions.energy_learning import OBJECTIVES, learned_by
from pgen.errors import OptionError
from pgen.fitting import UnusedOption
from pgen.inspection import inspect_problem
from pgen.learning import ESCAPED, incomparable, learners_of, watched
from pgen.problem import Problem
from pgen.registry import Registry

DATA = {"x": 0.3 * torch.randn(400, 1, generator=torch.Generator().manual_seed(0)) + 5.0}
WAYS = {way.name: way for way in OBJECTIVES}
SCORED = (
    "noise-contrastive",
    "conditional-noise-contrastive",
    "energy-discrepancy",
    "score-matching",
    "sliced-score-matching",
    "denoising-score-matching",
)


class Bowl(nn.Module):
    def __init__(self, support=constraints.real):
        super().__init__()
        self.log_a, self.b = nn.Parameter(torch.tensor(0.0)), nn.Parameter(torch.tensor(4.5))
        self.support = support

    def energy(self, x):
        return self.log_a.exp() * (x[..., 0] - self.b).square() / 2

    def forward(self, n):
        with pyro.plate("data", n):
            pyro.sample("x", Energy(self.energy, (1,), support=self.support))


def learners(data, *conversions):
    structure, problem = inspect_problem(Problem.of(Bowl(), data))
    return learners_of(problem, structure, {"x": conversions})


def test_a_memory_is_made_from_the_data():
    way = learned_by(PersistentContrastiveDivergence(chains=50))
    found = learners(DATA, way)
    memory = found["x"].memories[way.name]
    assert memory.observed
    assert memory.inner.position.shape == (50, 1)
    torch.testing.assert_close(memory.inner.frame.centre, DATA["x"].mean(0))
    torch.testing.assert_close(memory.inner.frame.scale, DATA["x"].std(0))
    assert list(found["x"].modules()) == [way.name]
    assert learners_of(Problem.of(Bowl(), DATA), None, {}) == {}


def test_rows_that_are_missing_are_no_data():
    x = DATA["x"].clone()
    x[::2] = math.nan
    frame = learners({"x": x}, OBJECTIVES[0])["x"].memories[OBJECTIVES[0].name].inner.frame
    torch.testing.assert_close(frame.centre, x[1::2].mean(0))


def test_what_memories_tell_is_told_by_site():
    found = learners(DATA, OBJECTIVES[0])
    assert found["x"].told() == {}
    found["x"].memories[OBJECTIVES[0].name].told = {"spread": torch.tensor(1.0)}
    assert found["x"].told() == {"spread": torch.tensor(1.0)}
    assert list(watched(found)) == [f"x.{ESCAPED}"]
    assert "energy at site 'x'" in watched(found)[f"x.{ESCAPED}"]


def test_sites_that_are_learned_as_they_are_answered_are_left_out():
    structure = pgen.explain(Bowl(), DATA).structure
    assert {c.name for c in structure.conversions} == {c.name for c in Registry.installed().conversions}
    answers = answering(structure, {})
    assert [c.name for c in answers["x"]] == ["quadrature"]
    ways = {"x": ("noise-contrastive", "annealed-importance")}
    found = learning(structure, ways, answers)["x"]
    assert [c.name for c in found] == ["noise-contrastive"]
    assert [c.name for c in answering(structure, ways)["x"]] == ["annealed-importance"]
    assert learning(structure, ways, {"x": found}) == {}


@pytest.mark.parametrize("way", SCORED)
def test_a_run_stops_early_by_losses_that_can_be_compared(way):
    assert incomparable(learners(DATA, WAYS[way])) is None
    run = pgen.Run(
        steps=400, lr=0.02, batch_size=400, validation=0.2, patience=3, validate_every=20, progress=False
    )
    fitted = pgen.fit(Bowl(), DATA, pgen.backend("exact", via={"x": way}), run=run)
    assert abs(float(fitted.parameters["b"]) - 5) < 0.2
    assert math.exp(-float(fitted.parameters["log_a"]) / 2) < 0.45  # from 1 towards 0.3


def test_a_run_does_not_stop_by_an_energy():
    run = pgen.Run(steps=20, validation=0.2, patience=3, progress=False)
    with pytest.raises(OptionError, match="'x', learned by persistent-contrastive-divergence, is an energy"):
        pgen.fit(Bowl(), DATA, "exact", run=run)
    with pytest.warns(UnusedOption, match="constant moves"):
        pgen.fit(Bowl(), DATA, "exact", run=pgen.Run(steps=2, validation=0.2, progress=False))


@pytest.mark.parametrize(
    ("way", "support", "data", "told"),
    [
        ("pseudo-likelihood", constraints.real, DATA, "counted; use score matching"),
        ("score-matching", constraints.boolean, {"x": (DATA["x"] > 5).float()}, "use PseudoLikelihood"),
    ],
)
def test_an_objective_that_does_not_fit_names_the_site(way, support, data, told):
    with pytest.raises(OptionError, match=f"site 'x' cannot be learned by {way}.*{told}"):
        pgen.fit(Bowl(support), data, pgen.backend("exact", via={"x": way}))
