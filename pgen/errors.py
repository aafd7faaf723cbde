"""Every deliberate error of pgen: what was given, what was expected, where, and the correct call."""

from __future__ import annotations


class PgenError(Exception):
    """The family of all errors that pgen raises on purpose."""


class DataError(PgenError, ValueError):
    """The data cannot meet the program: wrong key, shape, support, NaN, or nothing at all."""


class ProgramError(PgenError, RuntimeError):
    """The program cannot be run, or holds something that pgen cannot honour."""


class OptionError(PgenError, ValueError):
    """An option of a backend, a run or a query has a value that it cannot have."""


class UnknownName(PgenError, LookupError):
    """A backend, program, data set or conversion of that name is not installed."""


class Refused(PgenError):
    """The backend examined the program and cannot serve it; carries the `Refusal`."""

    def __init__(self, message: str, refusal: object = None) -> None:
        """Keep the refusal beside its message."""
        super().__init__(message)
        self.refusal = refusal


class Unanswerable(PgenError):
    """The fitted program was asked a query that its offer does not include."""


class Dishonest(PgenError):
    """A backend answered a query more exactly than it offered, or in the wrong shape."""


class PluginError(PgenError):
    """A plugin cannot be loaded, clashes with another, or broke one of its promises."""


class CheckpointError(PgenError):
    """A saved file or folder is missing, truncated, altered, or not what it claims to be."""


class Diverged(PgenError, ArithmeticError):
    """Training met numbers that are not finite and could not recover."""


class MeasureError(PgenError, TypeError):
    """A density was about to pass for a probability mass, or a bound for a likelihood."""


class Intractable(PgenError, NotImplementedError):
    """A distribution was asked for something that it cannot compute; names the capability that it lacks."""
