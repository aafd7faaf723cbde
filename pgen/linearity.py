"""Whether a program is linear in its Gaussian latents, told by a few runs along straight lines.

A log density that is quadratic in some values has no third differences along any line through them. A law that
bends (a network in the mean, a latent in the scale) has.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from pyro import poutine
from torch import Tensor

from pgen.handlers import Substitute

_REACH = 2.0  # standard deviations (of a standard normal) between two points of a line
_LINES = 2


def bent_sites(
    run: Callable[[], object], latents: Collection[str], sites: Collection[str]
) -> tuple[str, ...]:
    r"""The sites whose log density is seen not to be quadratic in the named latents.

    Along $z_0 + t d$ the third difference $f(2) - 2 f(1) + 2 f(-1) - f(-2)$ of each site's log density is compared
    with its range. A program that cannot be run there is given the benefit of the doubt.

    Args:
        run: the program with its data.
        latents: real-valued latents; the others keep one value.
        sites: the sites to look at, those with a density.
    """
    found: set[str] = set()
    first = poutine.trace(run).get_trace()
    drawn = {n: s["value"] for n, s in first.nodes.items() if s["type"] == "sample" and not s["is_observed"]}
    drawn = {n: v for n, v in drawn.items() if isinstance(v, Tensor)}
    for _ in range(_LINES):
        ways = {n: _REACH * torch.randn_like(drawn[n]) for n in latents if n in drawn}
        try:
            f = {
                t: _densities(run, {**drawn, **{n: drawn[n] + t * d for n, d in ways.items()}}, sites)
                for t in (-2, -1, 0, 1, 2)
            }
        except (RuntimeError, ValueError, ArithmeticError):
            return ()
        for site in sites:
            third = f[2][site] - 2 * f[1][site] + 2 * f[-1][site] - f[-2][site]
            values = [f[t][site] for t in f]
            noise = 1e-3 * (max(values) - min(values)) + 1e-4 * max(map(abs, values)) + 1e-6
            if abs(third) > noise:
                found.add(site)
    return tuple(s for s in sites if s in found)


def _densities(
    run: Callable[[], object], values: dict[str, Tensor], sites: Collection[str]
) -> dict[str, float]:
    trace = poutine.trace(Substitute(values)(run)).get_trace()
    trace.compute_log_prob(lambda name, _: name in sites)
    return {name: float(trace.nodes[name]["log_prob"].double().sum()) for name in sites}
