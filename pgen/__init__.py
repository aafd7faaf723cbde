"""pgen: a generative model is a Pyro program, written once; how it is learned and queried is a swap.

>>> import pgen, torch, pyro, pyro.distributions as dist
>>> def coin(n):
...     p = pyro.sample("p", dist.Beta(2.0, 2.0))
...     with pyro.plate("data", n):
...         pyro.sample("x", dist.Bernoulli(p))
>>> fitted = pgen.fit(coin, {"x": torch.tensor([1.0, 1.0, 0.0, 1.0])}, "exact")
>>> round(float(fitted.marginals()["p"].mean), 3)
0.625
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pgen import distributions, errors, testing
    from pgen.capability import Capability, Estimate, Exactness, Offer, Query, Rank, Refusal
    from pgen.choice import learned_factor, names_of, require
    from pgen.comparison import compare
    from pgen.conversion import Conversion
    from pgen.draws import Draws
    from pgen.fitted import Fitted
    from pgen.fitting import explain, fit, load
    from pgen.fitting import make_backend as backend
    from pgen.inspection import structure_of
    from pgen.problem import Problem
    from pgen.protocols import Answers, Backend
    from pgen.registry import Registry, hookimpl, hookspec
    from pgen.run import Run
    from pgen.structure import Site, Structure

__version__ = "0.1.0"

__all__ = [
    "Answers",
    "Backend",
    "Capability",
    "Conversion",
    "Draws",
    "Estimate",
    "Exactness",
    "Fitted",
    "Offer",
    "Problem",
    "Query",
    "Rank",
    "Refusal",
    "Registry",
    "Run",
    "Site",
    "Structure",
    "backend",
    "compare",
    "distributions",
    "errors",
    "explain",
    "fit",
    "hookimpl",
    "hookspec",
    "learned_factor",
    "load",
    "names_of",
    "require",
    "structure_of",
    "testing",
]

# Names are imported when they are first used, so that `pgen --help` and plugin metadata need no torch.
_HOMES = {
    "capability": ("Capability", "Estimate", "Exactness", "Offer", "Query", "Rank", "Refusal"),
    "choice": ("learned_factor", "names_of", "require"),
    "comparison": ("compare",),
    "conversion": ("Conversion",),
    "draws": ("Draws",),
    "fitted": ("Fitted",),
    "fitting": ("explain", "fit", "load", "make_backend"),
    "problem": ("Problem",),
    "protocols": ("Answers", "Backend"),
    "registry": ("Registry", "hookimpl", "hookspec"),
    "run": ("Run",),
    "inspection": ("structure_of",),
    "structure": ("Site", "Structure"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
_MODULES = ("distributions", "errors", "testing")


def __getattr__(name: str) -> Any:
    """Import a public name from its module at its first use."""
    if name in _MODULES:
        return importlib.import_module(f"pgen.{name}")
    own = {"backend": "make_backend"}.get(name, name)  # `backend` is a parameter of the functions beside it
    if own not in _HOME_OF:
        raise AttributeError(f"module 'pgen' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(importlib.import_module(f"pgen.{_HOME_OF[own]}"), own)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
