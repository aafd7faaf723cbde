"""Energies as programs: their sites, and that a joint energy classifies by its own logits."""

import torch

import pgen
from pgen.zoo import BoltzmannMachine, EnergyModel, JointEnergy

RUN = pgen.Run(steps=20, progress=False)


def test_vectors_and_bits_are_one_site():
    torch.manual_seed(0)
    for program, x in (
        (EnergyModel(3), torch.randn(50, 3)),
        (
            BoltzmannMachine(6, 2, torch.bernoulli(torch.full((50, 6), 0.3))),
            torch.bernoulli(torch.full((50, 6), 0.3)),
        ),
    ):
        structure = pgen.structure_of(program, {"x": x})
        assert structure.observed == ("x",)
        assert structure.latents == ()
        fitted = pgen.fit(program, {"x": x}, "exact", run=RUN)
        assert fitted.history.steps == 20
        assert fitted.sample(7, seed=0)["x"].shape == (7, x.shape[1])


def test_a_joint_energy_classifies_by_its_logits_and_takes_rows_without_a_label():
    torch.manual_seed(1)
    program = JointEnergy(4, 3, hidden=(16,))
    y = torch.randint(3, (60,))
    x = torch.randn(60, 4) / 2 + y[:, None] - 1
    fitted = pgen.fit(program, {"x": x, "y": y}, "exact", run=pgen.Run(steps=300, lr=1e-2, progress=False))
    found = fitted.marginals({"x": x})["y"].probs
    assert float((found.argmax(-1) == y).double().mean()) > 0.7
    labels = y.double()
    labels[::2] = torch.nan
    half = pgen.fit(program, {"x": x, "y": labels}, "exact", run=RUN)
    assert half.history.steps == 20
