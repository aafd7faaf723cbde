"""Programs of the zoo: they run, their structure is what they say, and closed forms are right."""

import itertools
import math

import pyro
import pytest
import torch
from pyro import poutine

from pgen import Registry, structure_of
from pgen.errors import OptionError
from pgen.zoo import (
    HMM,
    HVAE,
    PPCA,
    VAE,
    CausalImage,
    Encoder,
    MaskedAutoencoder,
    Mixture,
    SplineFlow,
    TreeMixture,
    logistic_regression,
    plugin,
)

GENERATIVE = {
    "ppca": lambda: PPCA(features=5, latents=2),
    "mixture": lambda: Mixture(features=5, components=3),
    "trees": lambda: TreeMixture(features=5, components=3),
    "vae": lambda: VAE(features=5, latents=2, levels=4, hidden=8),
    "vae, free logits": lambda: VAE(features=5, latents=2, levels=4, hidden=8, likelihood="categorical"),
    "vae, black and white": lambda: VAE(features=5, latents=2, levels=2, hidden=8),
    "hvae": lambda: HVAE(features=5, above=2, latents=3, levels=4, hidden=8),
    "flow": lambda: SplineFlow(features=5, hidden=8),
    "made": lambda: MaskedAutoencoder(features=5, levels=4, hidden=8),
    "made, real": lambda: MaskedAutoencoder(features=5, levels=None, hidden=8),
    "causal image": lambda: CausalImage((1, 5), levels=4, channels=4),
}


@pytest.mark.parametrize("name", list(GENERATIVE))
def test_a_program_draws_and_scores_its_rows(name):
    program = GENERATIVE[name]()
    trace = poutine.trace(program).get_trace(7)
    trace.compute_log_prob()
    assert trace.nodes["x"]["value"].shape == (7, 5)
    assert trace.nodes["x"]["log_prob"].shape == (7,)
    scores = [n["log_prob"] for n in trace.nodes.values() if n["type"] == "sample" and "log_prob" in n]
    assert all(s.isfinite().all() for s in scores)


@pytest.mark.parametrize("name", list(GENERATIVE))
def test_its_structure_has_the_data_plate(name):
    program = GENERATIVE[name]()
    x = poutine.trace(program).get_trace(7).nodes["x"]["value"].detach()
    structure = structure_of(program, {"x": x})
    assert structure.observed == ("x",)
    assert structure.data_plate == "data"
    assert all(structure.local(site) for site in structure.sites)


def test_latents_of_the_programs_that_have_some():
    def latents(program, data):
        return set(structure_of(program, data).latents)

    x = torch.zeros(7, 5)
    assert latents(GENERATIVE["hvae"](), {"x": x}) == {"above", "z"}
    assert latents(GENERATIVE["mixture"](), {"x": x}) == {"component"}
    assert latents(GENERATIVE["trees"](), {"x": x}) == {"component"}
    assert latents(logistic_regression(5, 3), {"x": x, "y": torch.zeros(7).long()}) == {"weight", "bias"}
    assert latents(HMM(2, 4), {"x": torch.zeros(7, 3).long()}) == {"z_0", "z_1", "z_2"}


def test_the_flow_on_levels_has_a_bound():
    law = poutine.trace(SplineFlow(features=5, levels=4, hidden=8)).get_trace(7).nodes["x"]
    assert law["value"].dtype == torch.long
    assert law["fn"].bound(law["value"]).shape == (7,)


def test_logistic_regression_takes_many_weights_at_once():
    model = logistic_regression(4, 3)
    x, y = torch.randn(5, 4), torch.randint(0, 3, (5,))
    many = {"weight": torch.randn(6, 1, 4, 3), "bias": torch.randn(6, 1, 3)}

    def scores(values):
        trace = poutine.trace(poutine.condition(model, values)).get_trace(x, y)
        trace.compute_log_prob()
        return trace.nodes["y"]["log_prob"]

    together = scores(many)
    assert together.shape == (6, 5)
    for k in range(6):
        one = scores({name: value[k, 0] for name, value in many.items()})
        torch.testing.assert_close(together[k], one)


def joint_mass(program, sites, *args):
    """The sum of the joint mass over all values of the sites: one, for a program of discrete sites."""
    total = 0.0
    for values in itertools.product(*(range(k) for k in sites.values())):
        chosen = {name: torch.tensor([v]) for name, v in zip(sites, values, strict=True)}
        trace = poutine.trace(poutine.condition(poutine.uncondition(program), chosen)).get_trace(*args)
        total += float(trace.log_prob_sum().detach().exp())
    return total


def test_the_hidden_markov_model_is_a_distribution():
    sites = {"z_0": 2, "x_0": 3, "z_1": 2, "x_1": 3}
    program = HMM(states=2, symbols=3)
    assert joint_mass(program, sites, torch.zeros(1, 2).long()) == pytest.approx(1.0, abs=1e-5)


def test_ppca_evidence_and_posterior_are_bayes_rule():
    """log p(x) = log p(z) + log p(x | z) - log p(z | x), for any z."""
    program = PPCA(features=5, latents=2, noise=0.7).double()
    x = torch.randn(4, 5, dtype=torch.float64)
    for _ in range(3):
        z = torch.randn(4, 2, dtype=torch.float64)
        trace = poutine.trace(poutine.condition(program, {"z": z, "x": x})).get_trace(4)
        trace.compute_log_prob()
        joint = trace.nodes["z"]["log_prob"] + trace.nodes["x"]["log_prob"]
        torch.testing.assert_close(joint - program.posterior(x).log_prob(z), program.log_evidence(x))


def test_ppca_most_likely_is_a_maximum():
    truth = PPCA(features=6, latents=2, noise=0.5).double()
    x = poutine.trace(truth).get_trace(300).nodes["x"]["value"].detach()
    best = PPCA.most_likely(x, latents=2)
    score = best.log_evidence(x).mean()
    gradients = torch.autograd.grad(score, list(best.parameters()))
    assert all(float(g.abs().max()) < 1e-8 for g in gradients)
    assert float(score.detach()) > float(truth.log_evidence(x).mean().detach())
    with pytest.raises(OptionError, match="expected 1 to 5"):
        PPCA.most_likely(x, latents=6)


def test_the_encoder_is_a_guide_for_the_vae():
    vae, encoder = VAE(features=5, latents=2, levels=4, hidden=8), Encoder(2, 5, 4, hidden=8)
    x = torch.randint(0, 4, (7, 5))
    guide = poutine.trace(encoder).get_trace(x)
    replayed = poutine.trace(poutine.replay(poutine.condition(vae, {"x": x}), guide)).get_trace(7)
    assert replayed.nodes["z"]["value"] is guide.nodes["z"]["value"]
    assert math.isfinite(float(replayed.log_prob_sum().detach() - guide.log_prob_sum().detach()))


def test_a_likelihood_that_does_not_fit_is_named():
    with pytest.raises(OptionError, match="likelihood='bernoulli' for 17 levels"):
        VAE(likelihood="bernoulli")


def test_the_zoo_is_a_plugin():
    registry = Registry.of(plugin)
    assert {"ppca", "mixture", "hmm", "logistic-regression", "vae", "hvae", "flow", "made"} <= set(
        registry.programs
    )
    assert {"digits", "ring", "grid", "moons", "checkerboard", "gaussians"} <= set(registry.datasets)
    for name, maker in registry.programs.items():
        assert maker.__doc__, f"program {name!r} does not say what it is"
        assert callable(maker())
    for name, reader in registry.datasets.items():
        assert reader.__doc__, f"data set {name!r} does not say what it is"


def test_making_a_program_leaves_pyro_as_it_was():
    for maker in plugin.pgen_programs().values():
        maker()
    assert not pyro.get_param_store()
