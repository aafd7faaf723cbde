"""Named programs and data sets, for the command line, the tutorials and the tests."""

from pgen.zoo.data import Data
from pgen.zoo.diffusion import DenoisingDiffusion
from pgen.zoo.energy import BoltzmannMachine, EnergyModel, JointEnergy
from pgen.zoo.flow import SplineFlow
from pgen.zoo.hmm import HMM
from pgen.zoo.hvae import HVAE
from pgen.zoo.inverse import Measured, blur, downsample, fourier, greyscale, mask, radon
from pgen.zoo.logistic_regression import logistic_regression
from pgen.zoo.made import CausalImage, MaskedAutoencoder
from pgen.zoo.mixture import Mixture
from pgen.zoo.ppca import PPCA
from pgen.zoo.trees import Tree, TreeMixture, chow_liu
from pgen.zoo.vae import VAE, Encoder

__all__ = [
    "HMM",
    "HVAE",
    "PPCA",
    "VAE",
    "BoltzmannMachine",
    "CausalImage",
    "Data",
    "DenoisingDiffusion",
    "Encoder",
    "EnergyModel",
    "JointEnergy",
    "MaskedAutoencoder",
    "Measured",
    "Mixture",
    "SplineFlow",
    "Tree",
    "TreeMixture",
    "blur",
    "chow_liu",
    "downsample",
    "fourier",
    "greyscale",
    "logistic_regression",
    "mask",
    "radon",
]
