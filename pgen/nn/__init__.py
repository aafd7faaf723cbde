"""The few networks that programs and guides here need."""

from pgen.nn.conv import CausalConv, CausalConv2d
from pgen.nn.made import MADE, MaskedLinear
from pgen.nn.mlp import MLP
from pgen.nn.sets import DeepSet

__all__ = ["MADE", "MLP", "CausalConv", "CausalConv2d", "DeepSet", "MaskedLinear"]
