"""The few networks that programs and guides here need."""

from pgen.nn.boltzmann import RBM, GaussianRBM
from pgen.nn.conv import CausalConv, CausalConv2d
from pgen.nn.deep_boltzmann import DeepBoltzmann
from pgen.nn.denoisers import DenoiserMLP, EnergyDenoiser, Preconditioned
from pgen.nn.embedding import NoiseEmbedding
from pgen.nn.energies import ConvEnergy, MLPEnergy
from pgen.nn.made import MADE, MaskedLinear
from pgen.nn.mlp import MLP
from pgen.nn.self_conditioned import SelfConditioned
from pgen.nn.sets import DeepSet
from pgen.nn.tokens import TokenTransformer
from pgen.nn.unet import UNet

__all__ = [
    "MADE",
    "MLP",
    "RBM",
    "CausalConv",
    "CausalConv2d",
    "ConvEnergy",
    "DeepBoltzmann",
    "DeepSet",
    "DenoiserMLP",
    "EnergyDenoiser",
    "GaussianRBM",
    "MLPEnergy",
    "MaskedLinear",
    "NoiseEmbedding",
    "Preconditioned",
    "SelfConditioned",
    "TokenTransformer",
    "UNet",
]
