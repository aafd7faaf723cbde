"""Named programs and data sets, for the command line, the tutorials and the tests."""

from pgen.zoo.data import Data
from pgen.zoo.flow import SplineFlow
from pgen.zoo.hmm import HMM
from pgen.zoo.hvae import HVAE
from pgen.zoo.logistic_regression import logistic_regression
from pgen.zoo.made import CausalImage, MaskedAutoencoder
from pgen.zoo.mixture import Mixture
from pgen.zoo.ppca import PPCA
from pgen.zoo.vae import VAE, Encoder

__all__ = [
    "HMM",
    "HVAE",
    "PPCA",
    "VAE",
    "CausalImage",
    "Data",
    "Encoder",
    "MaskedAutoencoder",
    "Mixture",
    "SplineFlow",
    "logistic_regression",
]
