"""Choosing a backend: pure functions of a program's structure and of what the installed backends answer about it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.markup import escape
from rich.table import Table

from pgen.capability import Capability, Exactness, Offer, Query, Refusal
from pgen.conversion import Conversion, exactness_of
from pgen.errors import OptionError, Refused
from pgen.protocols import Backend
from pgen.structure import Structure
from pgen.tables import as_text

Paths = dict[str, tuple[Conversion, ...]]


def require(
    structure: Structure,
    latent: Collection[Capability] = (),
    observed: Collection[Capability] = (),
    via: Mapping[str, str] | None = None,
    *,
    random: bool = True,
) -> Paths | Refusal:
    """The conversions that give every site what a backend needs, or the first site that cannot have it.

    Args:
        structure: the program.
        latent: capabilities needed at latent sites.
        observed: capabilities needed at observed sites.
        via: conversions to go through, by site, as the user asked.
        random: whether a conversion may answer with another number each time.

    Raises:
        OptionError: `via` names a site that the program does not have.
        UnknownName: `via` names a conversion that is not installed.
    """
    via = via or {}
    strange = [s for s in via if s not in structure.sites]
    if strange:
        raise OptionError(
            f"via names the site {strange[0]!r}, which {structure.name} does not have; its sites: {', '.join(structure.sites)}"
        )
    paths: Paths = {}
    for site in structure:
        if site.factor:
            continue
        path: tuple[Conversion, ...] = ()
        for needed in observed if site.observed else latent:
            has = site.capabilities | {c.gives for c in path}
            step = structure.conversions.path(
                has, needed, via.get(site.name) if not path else None, random=random
            )
            if step is None:
                able = ", ".join(sorted(c.value for c in site.capabilities)) or "nothing"
                role = "observed" if site.observed else "latent"
                return Refusal(
                    site.name,
                    needed.value,
                    f"{role} site {site.name!r} ({site.distribution}) can {able}; no installed conversion leads from there to {needed.value}",
                )
            path = (*path, *(c for c in step if c not in path))
        if path:
            paths[site.name] = path
    return paths


def drawing(
    structure: Structure, paths: Mapping[str, tuple[Conversion, ...]]
) -> tuple[Paths, Exactness] | None:
    """The paths, longer where a site needs more to be drawn, and how exact the draws are; None where one cannot be."""
    whole, weakest = dict(paths), Exactness.EXACT
    drawn = {Capability.SAMPLE, Capability.RSAMPLE}
    for site in structure:
        if site.factor or site.capabilities & drawn:
            continue
        path = whole.get(site.name, ())
        if not any(c.gives in drawn for c in path):
            step = structure.conversions.path(site.capabilities | {c.gives for c in path}, Capability.SAMPLE)
            if step is None:
                return None
            path = whole[site.name] = (*path, *step)
        how = exactness_of(c for c in path if c.gives in drawn)
        weakest = min(weakest, how, key=lambda e: e.strength)
    return whole, weakest


def names_of(paths: Mapping[str, tuple[Conversion, ...]]) -> dict[str, tuple[str, ...]]:
    """Paths as an offer carries them: names of conversions by site."""
    return {site: tuple(c.name for c in path) for site, path in paths.items()}


def learned_factor(structure: Structure) -> Refusal | None:
    """A refusal where learned tensors are reached only through `pyro.factor`, which has no normaliser to learn by."""
    for name in structure.factors:
        factor = structure.sites[name]
        elsewhere = {p for s in structure if not s.factor for p in s.params}
        learned = [p for p in factor.params if p not in elsewhere]
        if learned:
            return Refusal(
                name,
                "log-normaliser gradient",
                f"factor {name!r} depends on the learned {', '.join(learned)}: pyro.factor adds soft evidence as it stands, so its "
                "normaliser log Z, and with it the gradient that keeps the energy from growing without bound, is missing. Write the "
                "energy as the law of a site, or hold those tensors fixed (requires_grad_(False))",
            )
    return None


@dataclass(frozen=True)
class Row:
    """What one backend says about a program."""

    backend: str
    answer: Offer | Refusal

    @property
    def offered(self) -> bool:
        """Whether the backend can serve the program."""
        return isinstance(self.answer, Offer)


@dataclass(frozen=True)
class Explanation:
    """What every installed backend says about a program: prints as a table, iterates as rows."""

    structure: Structure
    rows: tuple[Row, ...]

    def __iter__(self) -> Iterator[Row]:
        """The rows, the backend that would be chosen first."""
        return iter(self.rows)

    def __len__(self) -> int:
        """How many backends were asked."""
        return len(self.rows)

    def __getitem__(self, backend: str) -> Row:
        """The row of one backend."""
        return next(r for r in self.rows if r.backend == backend)

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        """The program's structure, then a table of answers."""
        yield escape(repr(self.structure)) + "\n"
        table = Table("backend", "answer", *(q.value for q in Query), "why", show_lines=True)
        for row in self.rows:
            if isinstance(row.answer, Offer):
                answers = [row.answer.answers[q].value if q in row.answer.answers else "-" for q in Query]
                paths = "".join(f"\n{site}: {' -> '.join(path)}" for site, path in row.answer.paths.items())
                table.add_row(
                    row.backend,
                    f"[green]{row.answer.rank.name.lower()}[/green]",
                    *answers,
                    escape(row.answer.why + paths),
                )
            else:
                where = f"site {row.answer.site!r}: " if row.answer.site else ""
                missing = f"{where}missing {row.answer.missing}"
                table.add_row(
                    row.backend, "[red]no[/red]", *("" for _ in Query), escape(f"{missing}\n{row.answer.why}")
                )
        yield table

    def __str__(self) -> str:
        """The table as plain text."""
        return as_text(self)

    def __repr__(self) -> str:
        """The table as plain text."""
        return str(self)


def examine(structure: Structure, backends: Sequence[Backend]) -> Explanation:
    """Ask every backend; the best offer comes first."""
    rows = [Row(b.name, _asked(b, structure)) for b in backends]
    return Explanation(
        structure, tuple(sorted(rows, key=lambda r: (*(-x for x in _merit(r.answer)), r.backend)))
    )


def _asked(backend: Backend, structure: Structure) -> Offer | Refusal:
    """A backend's answer; one that cannot answer keeps nobody from asking the others."""
    try:
        answer = backend.examine(structure)
    except Exception as error:  # a stranger's code
        return Refusal(None, "an answer", f"its examine raised {type(error).__name__}: {error}")
    if not isinstance(answer, (Offer, Refusal)):
        return Refusal(
            None, "an answer", f"its examine returned {type(answer).__name__}, not an Offer or a Refusal"
        )
    return answer


def choose(structure: Structure, backends: Sequence[Backend]) -> Backend:
    """The backend that suits the program best: by its own rank, then by how exactly it answers.

    Raises:
        Refused: every backend refuses; the message says why each does.
        OptionError: two offers are equally good.
    """
    explained = examine(structure, backends)
    offers = [r for r in explained if r.offered]
    if not offers:
        reasons = "\n".join(f"  {r.backend}: {refusal_text(r.answer)}" for r in explained)
        raise Refused(
            f"no installed backend can serve {structure.name}:\n{reasons or '  (none is installed)'}"
        )
    if len(offers) > 1 and _merit(offers[0].answer) == _merit(offers[1].answer):
        raise OptionError(
            f"{offers[0].backend!r} and {offers[1].backend!r} serve {structure.name} equally well; name one: "
            f"pgen.fit(program, data, {offers[0].backend!r})"
        )
    return next(b for b in backends if b.name == offers[0].backend)


def refusal_text(refusal: Any) -> str:
    """A refusal in one line."""
    where = f"site {refusal.site!r} lacks {refusal.missing}" if refusal.site else f"missing {refusal.missing}"
    return f"{where}: {refusal.why}"


def _merit(answer: Offer | Refusal) -> tuple[int, int]:
    if not isinstance(answer, Offer):
        return (0, 0)
    return (int(answer.rank), sum(e.strength + 1 for e in answer.answers.values()))
