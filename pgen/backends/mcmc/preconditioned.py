r"""A density in the coordinates of a guide: Neural transport Monte Carlo.

    log π(v) = log p(x, T(v)) + log|det T'(v)|

T takes standard normal vectors to the latents as a guide has learned them. Were the guide the posterior, π would be a
standard normal; funnels and bananas become nearly one. Chains move v, and stay exact whatever T is.

Hoffman, Sountsov, Dillon, Langmore, Tran and Vasudevan: NeuTra-lizing bad geometry in Hamiltonian Monte Carlo using
neural transport (2019).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from pgen.density import Density
from pgen.errors import OptionError
from pgen.guides.transport import Transport, transport_of
from pgen.problem import Problem


@dataclass(frozen=True)
class Preconditioned(Density):
    """A program's latents as a vector that a transport takes to the usual one.

    Attributes:
        plain: the density on the usual vector.
        transport: from vectors `[..., d]` to unconstrained latents.
    """

    plain: Density = field(kw_only=True)
    transport: Transport = field(kw_only=True)

    @staticmethod
    def by(transport: Transport, density: Density) -> Preconditioned:
        """A density in other coordinates.

        Raises:
            OptionError: the transport is of other latents.
        """
        wanted = {slot.name: slot.size for slot in density.slots}
        if list(wanted.items()) != list(transport.sizes.items()):
            raise OptionError(
                f"precondition is a map to {_listed(transport.sizes)}; expected one to the continuous latents of "
                f"{density.structure.name}, {_listed(wanted)} (elements, unconstrained): fit the guide to the same program and data"
            )
        own = {f.name: getattr(density, f.name) for f in fields(Density)}
        return Preconditioned(
            **own, plain=density, transport=transport.to(density.problem.device, density.dtype)
        )

    def log_density(
        self, position: Tensor, problem: Problem | None = None, given: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Log density of one vector `[d]`: a scalar."""
        u, volume = self.transport.forward(position)
        return self.plain.log_density(u, problem, given) + volume

    def _parts(self, position: Tensor) -> dict[str, Tensor]:
        # All else that is asked at a vector is asked at the latents that it stands for.
        return super()._parts(self.transport.forward(position)[0])

    def volume(self, positions: Tensor) -> Tensor:
        """What the coordinates add to the log density at vectors `[n, d]`."""
        with torch.no_grad():
            return self.transport.forward(positions.to(self.dtype))[1].to(positions.dtype)

    def unconstrained(self, values: Mapping[str, Tensor]) -> Tensor:
        """Vectors `[n, d]` of values of the continuous latents `[n, *shape]`."""
        with torch.no_grad():
            return self.transport.inverse(super().unconstrained(values))


def transport_from(given: Any) -> Transport:
    """The transport of a fit, one that was made before, or one as `Transport.plain` says it.

    Raises:
        OptionError: what was given is none of these.
        Unanswerable: the fit has none; the message says which fits do.
    """
    if isinstance(given, Transport):
        return given
    if isinstance(given, Mapping):
        return transport_of(given)
    made = getattr(given, "transport", None)
    if made is None:
        raise OptionError(
            f"MCMC(precondition={given!r}): expected a fit of the same program and data by pgen.backend('variational', guide='flow')"
        )
    return made()


def _listed(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name} ({size})" for name, size in sizes.items()) or "none"
