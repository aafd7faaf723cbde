"""The zoo as a plugin: its programs and data sets, named as any other plugin names its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pgen.registry import hookimpl
from pgen.zoo import datasets, toys
from pgen.zoo.data import Data
from pgen.zoo.diffusion import DenoisingDiffusion
from pgen.zoo.energy import BoltzmannMachine, EnergyModel, JointEnergy
from pgen.zoo.flow import SplineFlow
from pgen.zoo.hmm import HMM
from pgen.zoo.hvae import HVAE
from pgen.zoo.logistic_regression import logistic_regression
from pgen.zoo.made import CausalImage, MaskedAutoencoder
from pgen.zoo.mixture import Mixture
from pgen.zoo.ppca import PPCA
from pgen.zoo.trees import TreeMixture
from pgen.zoo.vae import VAE


@hookimpl
def pgen_programs() -> Mapping[str, Callable[..., Any]]:
    """Makers of programs: call one with options to get a Pyro program."""
    return {
        "boltzmann-machine": BoltzmannMachine,
        "causal-image": CausalImage,
        "diffusion": DenoisingDiffusion,
        "energy": EnergyModel,
        "flow": SplineFlow,
        "hmm": HMM,
        "hvae": HVAE,
        "joint-energy": JointEnergy,
        "logistic-regression": logistic_regression,
        "made": MaskedAutoencoder,
        "mixture": Mixture,
        "ppca": PPCA,
        "trees": TreeMixture,
        "vae": VAE,
    }


@hookimpl
def pgen_datasets() -> Mapping[str, Callable[[Path | None], Data]]:
    """Readers of data sets: call one with a folder, or None, to get a `Data`."""
    return {
        "digits": datasets.digits,
        "digits-binary": datasets.digits_binary,
        "digits-labelled": datasets.digits_labelled,
        "fashion-mnist": datasets.fashion_mnist,
        "mnist": datasets.mnist,
        "mnist-binary": datasets.mnist_binary,
        "sequences": toys.sequences,
        **toys.readers(),
        **{f"debd-{name}": datasets.debd(name) for name in datasets.DEBD},
    }
