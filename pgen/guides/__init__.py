"""Guides made from the structure of a program: amortized ones, by faithful inversion, and global ones."""

from pgen.guides.amortized import Amortized
from pgen.guides.automatic import Automatic
from pgen.guides.evidence import Reader, Slot

__all__ = ["Amortized", "Automatic", "Reader", "Slot"]
