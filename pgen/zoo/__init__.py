"""Named programs and data sets, for the command line, the tutorials and the tests."""

from pgen.zoo.data import Data
from pgen.zoo.diffusion import DenoisingDiffusion
from pgen.zoo.flow import SplineFlow
from pgen.zoo.hmm import HMM
from pgen.zoo.hvae import HVAE
from pgen.zoo.inverse import Measured, blur, downsample, fourier, greyscale, mask, radon
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
    "DenoisingDiffusion",
    "Encoder",
    "MaskedAutoencoder",
    "Measured",
    "Mixture",
    "SplineFlow",
    "blur",
    "downsample",
    "fourier",
    "greyscale",
    "logistic_regression",
    "mask",
    "radon",
]
