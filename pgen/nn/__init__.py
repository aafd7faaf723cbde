"""The few networks that programs and guides here need."""

from pgen.nn.conv import CausalConv, CausalConv2d
from pgen.nn.denoisers import DenoiserMLP, EnergyDenoiser, NoiseEmbedding, Preconditioned
from pgen.nn.made import MADE, MaskedLinear
from pgen.nn.mlp import MLP
from pgen.nn.sets import DeepSet
from pgen.nn.tokens import TokenTransformer
from pgen.nn.unet import UNet

__all__ = [
    "MADE",
    "MLP",
    "CausalConv",
    "CausalConv2d",
    "DeepSet",
    "DenoiserMLP",
    "EnergyDenoiser",
    "MaskedLinear",
    "NoiseEmbedding",
    "Preconditioned",
    "TokenTransformer",
    "UNet",
]
