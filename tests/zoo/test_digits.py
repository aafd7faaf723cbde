"""What the programs reach on handwritten digits, in nats per validation image."""

import pytest

from pgen import Run, backend, fit
from pgen.isolation import isolated
from pgen.zoo import HVAE, VAE, CausalImage, MaskedAutoencoder, SplineFlow
from pgen.zoo.datasets import digits

pytest.importorskip("sklearn")

FLOW = {"features": 64, "levels": 17}
# Program, options, backend, steps, learning rate, weight decay, kind, at most so many nats. Tomczak (2022)
# has 100.5 for a VAE, 100.4 for two layers, 88.7 for causal convolutions, 137.6 for an integer flow.
FIGURES = {
    "vae": (VAE, {}, "variational", 600, 2e-3, 0.01, "lower bound", 96.5),
    "hvae": (HVAE, {}, "variational", 600, 2e-3, 0.01, "lower bound", 97.0),
    "made": (MaskedAutoencoder, {}, "exact", 400, 3e-3, 0.05, "exact", 91.5),
    "causal-image": (CausalImage, {}, "exact", 300, 5e-3, 0.01, "exact", 87.5),
    "flow": (SplineFlow, FLOW, "exact", 200, 8e-3, 2.0, "lower bound", 98.0),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(FIGURES))
def test_nats_per_image(name, seed):
    maker, options, method, steps, lr, decay, kind, at_most = FIGURES[name]
    data = digits()
    with isolated(seed):
        program = maker(**options)
    run = Run(
        steps=steps,
        lr=lr,
        optimizer="adamw",
        weight_decay=decay,
        schedule="cosine",
        warmup_steps=steps // 10,
        ema=0.99,
        progress=False,
    )
    estimate = fit(program, data.train, backend(method), run=run, seed=seed).log_prob(data.valid)
    assert estimate.kind == kind
    assert estimate.measure == "mass"
    assert -float(estimate.value.mean()) <= at_most
