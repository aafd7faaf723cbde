"""pgen: a generative model is a Pyro program, written once; how it is learned and queried is a swap."""

from pgen import errors
from pgen.capability import Capability, Estimate, Exactness, Offer, Query, Rank, Refusal
from pgen.choice import learned_factor, names_of, require
from pgen.conversion import Conversion
from pgen.draws import Draws
from pgen.problem import Problem
from pgen.registry import Registry, hookimpl, hookspec
from pgen.structure import Site, Structure, structure_of

__version__ = "0.1.0"
