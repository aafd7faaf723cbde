"""A named data set: three splits of tensors by site or argument name, and what they are."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.distributions import Distribution

from pgen.capability import Measure


@dataclass(frozen=True)
class Data:
    """A data set that a program can be fitted to.

    Attributes:
        name: how it is asked for.
        train: tensors by name (a site or an argument of the program), which share their leading dimension.
        valid: the same for choosing among programs and settings.
        test: the same for the final figure.
        kind: whether what is observed has a probability `"mass"` (counts, levels) or a `"density"`.
        event_shape: shape of one `x`.
        levels: where `x` holds levels 0, 1, ...: how many.
        image: height and width of `x` as a picture, if it is one.
        truth: the law that drew the data, where it is known.
        description: one sentence.
        licence: under which terms it may be used.
    """

    name: str
    train: Mapping[str, Tensor]
    valid: Mapping[str, Tensor]
    test: Mapping[str, Tensor]
    kind: Measure
    event_shape: tuple[int, ...]
    levels: int | None = None
    image: tuple[int, int] | None = None
    truth: Distribution | None = None
    description: str = ""
    licence: str = ""
    more: Mapping[str, Any] = field(default_factory=dict)  # further options that the data settles

    @property
    def features(self) -> int:
        """How many scalars one `x` has."""
        return math.prod(self.event_shape)

    def options_for(self, factory: Callable[..., Any]) -> dict[str, Any]:
        """The options of a program's maker that this data settles: `features`, `levels`, `image`, ...

        >>> import torch
        >>> x = {"x": torch.zeros(3, 2)}
        >>> Data("blank", x, x, x, "density", (2,)).options_for(lambda features=64, hidden=128: None)
        {'features': 2}
        """
        known = {"features": self.features, "levels": self.levels, "image": self.image, **self.more}
        takes = inspect.signature(factory).parameters
        return {name: value for name, value in known.items() if name in takes and value is not None}

    def __repr__(self) -> str:
        """Name, sizes and shapes."""
        sizes = "/".join(str(len(next(iter(s.values())))) for s in (self.train, self.valid, self.test))
        keys = ", ".join(f"{k} {list(v.shape[1:])}" for k, v in self.train.items())
        return f"Data({self.name}: {sizes} rows of {keys}, a {self.kind})"
