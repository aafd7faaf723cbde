"""An amortized guide made from the program: its structure inverted faithfully, one network per latent."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import cast

import networkx as nx
import pyro
from torch import Tensor, nn

from pgen.algorithms.inversion import Order
from pgen.errors import DataError, OptionError
from pgen.guides.conditional import Conditional
from pgen.guides.evidence import Probe, Reader, Slot
from pgen.guides.families import FAMILIES, Continuous, Discrete, Family
from pgen.guides.features import require_latents
from pgen.guides.layout import Plates
from pgen.guides.plan import Globals, Plan, global_unit
from pgen.problem import Problem
from pgen.structure import Structure

_FULL_UP_TO = 200  # elements of a global latent that are correlated with each other unless told otherwise


class Amortized(nn.Module):
    r"""A guide $q(z \mid x) = \prod_i q(z_i \mid \mathrm{pa}^{-1}(z_i))$ with the structure of the posterior.

    The inverse parents $\mathrm{pa}^{-1}$ come from a faithful inversion of the program's graph
    (`pgen.algorithms.inversion`): observed sites, arguments, and latents drawn before. Each latent has a
    network that reads them and gives the law of the latent, shared over the rows, so that it serves any
    number of rows, seen or not.

    - Continuous latents are drawn in unconstrained space from `family`, then mapped to their support.
    - Discrete latents are drawn from free probabilities.
    - What lies in further plates than the latent is summarised as a set (`pgen.nn.DeepSet`) of any size.
      Plates whose elements follow different laws (pixels, time steps) are read element by element instead, at
      a fixed size.
    - Latents outside the plates of the data have free parameters, and a linear dependence on each other
      (`globals_="free"`: one posterior, for the data trained on), or are read off the data as a set as well
      (`globals_="pooled"`: any data set, for training on simulations).

    Make one with `Amortized.of`. It is a Pyro program: calling it draws every latent. All parameters exist
    from the start, so that a saved state loads into a fresh guide. Works under an outermost plate of
    particles, and with enumerated values.

    Attributes:
        inverse: the order in which latents are drawn, and the inverse parents of each.
        order: names of its sites in the order of drawing.
        graph: dependence among them.
        read: makes the arguments of a call from a problem.
        fixed: whether it serves only the rows that it was made for: never.

    References:
        Webb et al.: Faithful inversion of generative models for effective amortized inference (NeurIPS 2018).
        Kingma and Welling: Auto-encoding variational Bayes (ICLR 2014). Zaheer et al.: Deep sets (NeurIPS
        2017).

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> from pgen.problem import Problem
        >>> from pgen.inspection import structure_of
        >>> def model(n):
        ...     with pyro.plate("rows", n):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 0.3))
        >>> problem = Problem.of(model, {"x": torch.randn(10)})
        >>> guide = Amortized.of(problem, structure_of(problem))
        >>> guide.inverse.parents
        {'z': ('x',)}
        >>> guide(*guide.read(problem))["z"].shape
        torch.Size([10])
    """

    fixed = False

    def __init__(
        self,
        structure: Structure,
        probe: Probe,
        read: Reader,
        *,
        family: Family = "normal",
        globals_family: Family | None = None,
        hidden: Sequence[int] = (128, 128),
        order: Order = "reverse",
        globals_: Globals = "free",
        marginalised: Collection[str] = (),
        initial_scale: float = 0.3,
        rank: int = 8,
    ) -> None:
        super().__init__()
        _check_options(structure, (family, globals_family or family), order, globals_, marginalised)
        plan = Plan.of(structure, probe, read.inputs, marginalised, globals_, order)
        self.read = read
        self.layout = plan.layout
        self.inverse = plan.inverse
        self.free = plan.free
        self.linked = frozenset(p for n in plan.free for p in plan.inverse.parents[n] if p in plan.codes)
        coders = {name: plan.features(name) for name in plan.encoded()}
        self.features = nn.ModuleDict({_key(name): coder for name, coder in coders.items()})
        sizes = {name: coder.outputs for name, coder in coders.items()}
        self.laws = nn.ModuleDict()
        for name in plan.inverse.order:
            is_free, site, initial = name in plan.free, structure.sites[name], None
            if name in plan.codes:
                own = _globals_family(globals_family, family, plan.codes[name].numel) if is_free else family
                start = initial_scale * (0.1 if is_free else 1.0)
                head = Continuous(site, plan.codes[name], own, start, rank)
                head.standardise(*plan.moments[name])
                if is_free:
                    initial = head.spread(*global_unit(*plan.by_element(name)))
            else:
                head = Discrete(site)
            sources = plan.sources(name, sizes)
            widths = None if is_free else hidden
            self.laws[_key(name)] = Conditional(
                name, head, sources, *plan.folded(name, sources), plan.layout, widths, initial
            )

    @staticmethod
    def of(
        problem: Problem,
        structure: Structure,
        *,
        family: Family = "normal",
        globals_family: Family | None = None,
        hidden: Sequence[int] = (128, 128),
        order: Order = "reverse",
        globals_: Globals = "free",
        marginalised: Collection[str] = (),
        initial_scale: float = 0.3,
        rank: int = 8,
    ) -> Amortized:
        """Make a guide for a problem: shaped by its structure, scaled by its data and its prior.

        Args:
            problem: the program with the data, which means and standard deviations are taken from; where the
                program cannot take fewer rows, as `inspect_problem` returns it.
            structure: its structure.
            family: law of a continuous latent, in unconstrained space: `"normal"` (independent elements),
                `"low-rank"` or `"full"` (correlated within a site), `"flow"` (neural splines).
            globals_family: the same for global latents with free parameters; None: `"full"` in place of
                `"normal"` up to 200 elements, else as `family`.
            hidden: widths of each network; a linear map of the inputs is always added.
            order: `"reverse"` draws latents in the order of the program, `"forward"` against it; both are
                faithful.
            globals_: `"free"` or `"pooled"`, for latents outside the plates of the data.
            marginalised: latents that are summed out elsewhere: not drawn, and the dependence that they cause
                is kept.
            initial_scale: standard deviation to start from, in units of the prior's (a tenth of it for global
                latents).
            rank: of the `"low-rank"` family.

        Raises:
            ProgramError: a latent has a support that no guide can be made for, or one that depends on other
                latents.
            OptionError: an option has a value that it cannot have.
        """
        read = Reader(problem, structure)
        return Amortized(
            structure,
            Probe.of(problem, structure, read),
            read,
            family=family,
            globals_family=globals_family,
            hidden=hidden,
            order=order,
            globals_=globals_,
            marginalised=marginalised,
            initial_scale=initial_scale,
            rank=rank,
        )

    @property
    def order(self) -> tuple[str, ...]:
        """Names of its sites in the order of drawing."""
        return self.inverse.order

    @property
    def graph(self) -> nx.DiGraph:
        """Dependence among its sites, parents -> site."""
        return nx.DiGraph(self.inverse.graph.subgraph(self.inverse.order))

    def forward(self, observed: Mapping[str, Tensor], plates: Mapping[str, tuple]) -> dict[str, Tensor]:
        """Draw every latent at a Pyro site of its name, given what was observed.

        Args:
            observed: values of the observed sites; arguments of the program under `input:NAME`.
            plates: size and dimension of each plate, and indices if subsampled: `(size, dim)` or a `Slot`.

        Returns:
            The values drawn, by site.

        Raises:
            DataError: an observed value that the guide reads is not there, or a plate of fixed size has
                another size.
        """
        slots = self.layout.now(plates)
        opened = Plates(self.layout, slots)
        values: dict[str, Tensor] = {}
        encoded: dict[str, Tensor] = {}
        residuals: dict[str, Tensor] = {}
        for name in self.inverse.order:
            is_free, law = name in self.free, cast("Conditional", self.laws[_key(name)])
            for parent in self.inverse.parents[name]:
                if parent not in encoded and not (is_free and parent in residuals):
                    value = values[parent] if parent in values else self._seen(parent, observed, name, slots)
                    encoded[parent] = self.features[_key(parent)](value)
            outputs = law({**encoded, **residuals} if is_free else encoded, slots)
            with opened.around(name):
                values[name] = pyro.sample(name, law.head(outputs))
            if name in self.linked and isinstance(law.head, Continuous):
                residuals[name] = law.head.residual(outputs, values[name])
        return values

    def _seen(
        self, name: str, observed: Mapping[str, Tensor], latent: str, slots: Mapping[str, Slot]
    ) -> Tensor:
        """The value of an observed input, laid out along its plates."""
        if name not in observed:
            msg = (
                f"the guide of site {latent!r} reads {name!r}, which is not among what is observed now: "
                f"{', '.join(map(repr, observed)) or 'nothing'}. Observe it, or fit again with what you have."
            )
            raise DataError(msg)
        value = observed[name]
        return self.layout.place(name, value, slots) if name in self.layout.leading else value


def _globals_family(chosen: Family | None, family: Family, numel: int) -> Family:
    if chosen is None:
        return "full" if family == "normal" and numel <= _FULL_UP_TO else family
    return chosen


def _check_options(
    structure: Structure, families: tuple[str, str], order: str, globals_: str, marginalised: Collection[str]
) -> None:
    """Raise unless every option has a value that it can have."""
    choices = {
        "family": (families[0], FAMILIES),
        "globals_family": (families[1], FAMILIES),
        "order": (order, ("reverse", "forward")),
        "globals_": (globals_, ("free", "pooled")),
    }
    for option, (value, allowed) in choices.items():
        if value not in allowed:
            msg = f"Amortized({option}={value!r}): expected one of {', '.join(map(repr, allowed))}."
            raise OptionError(msg)
    require_latents("Amortized", structure, marginalised)


def _key(name: str) -> str:
    """A site name as the name of a submodule, which may hold no dot."""
    return name.replace("%", "%25").replace(".", "%2E")
