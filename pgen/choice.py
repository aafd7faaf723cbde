"""Choosing a backend: pure functions of a program's structure and of what the installed backends answer about it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.markup import escape
from rich.table import Table

from pgen.capability import Capability, Exactness, Offer, Query, Refusal
from pgen.conversion import Conversion, Purpose, exactness_of
from pgen.errors import OptionError, Refused
from pgen.protocols import Backend
from pgen.structure import Site, Structure
from pgen.tables import as_text

Paths = dict[str, tuple[Conversion, ...]]


def require(
    structure: Structure,
    latent: Collection[Capability] = (),
    observed: Collection[Capability] = (),
    via: Mapping[str, Any] | None = None,
    *,
    random: bool = True,
    purpose: Purpose = "answering",
) -> Paths | Refusal:
    """The conversions that give every site what a backend needs, or the first site that cannot have it.

    Args:
        structure: the program.
        latent: capabilities needed at latent sites.
        observed: capabilities needed at observed sites.
        via: conversions to go through, by site, as the user asked; those for another purpose are passed over.
        random: whether a conversion may answer with another number each time.
        purpose: what the site is to be converted for.

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
        wanted = observed if site.observed else latent
        asked = _asked_for(structure, via.get(site.name), purpose, wanted)
        for needed in wanted:
            has = site.capabilities | {c.gives for c in path}
            step = structure.conversions.path(
                has, needed, asked if not path else None, random=random, purpose=purpose, at=(site, structure)
            )
            if step is None:
                return _no_way(structure, site, needed, asked)
            path = (*path, *(c for c in step if c not in path))
        if path:
            paths[site.name] = path
    return paths


def _asked_for(
    structure: Structure, ways: Any, purpose: Purpose, wanted: Collection[Capability]
) -> Conversion | None:
    """The conversion that the user wants for a purpose, among one or several named for a site.

    One that gives draws is for drawing, where nobody wants draws here.
    """
    if ways is None:
        return None
    several = ways if isinstance(ways, (tuple, list)) else (ways,)
    named = [structure.conversions.named(way) for way in several]
    away = _DRAWN - set(wanted)
    return next((c for c in named if c.purpose in (None, purpose) and c.gives not in away), None)


def _no_way(structure: Structure, site: Site, needed: Capability, asked: Conversion | None) -> Refusal:
    able = ", ".join(sorted(c.value for c in site.capabilities)) or "nothing"
    role = "observed" if site.observed else "latent"
    start = f"{role} site {site.name!r} ({site.distribution}) can {able}; "
    if asked is not None:
        told = asked.unless(site, structure) or f"it leads to no {needed.value} there"
        return Refusal(site.name, needed.value, f"{start}via={asked.name!r} cannot be used: {told}")
    told = [
        (c.name, c.unless(site, structure))
        for c in structure.conversions
        if c.gives is needed and c.needs <= site.capabilities
    ]
    reasons = "".join(f"; {name}: {why}" for name, why in told if why)
    return Refusal(
        site.name, needed.value, f"{start}no installed conversion leads from there to {needed.value}{reasons}"
    )


def answering(structure: Structure, via: Mapping[str, Any]) -> Paths | Refusal:
    """The conversions by which a log probability is answered; sites whose normaliser nobody knows are left unnormalised."""
    wanted = (Capability.LOG_PROB,)
    given, fallen = dict(via), dict[str, tuple[Conversion, ...]]()
    while True:
        rest = replace(structure, sites={n: s for n, s in structure.sites.items() if n not in fallen})
        paths = require(
            rest, wanted, wanted, {k: v for k, v in given.items() if k in rest.sites or k not in fallen}
        )
        if not isinstance(paths, Refusal):
            return {n: p for n in structure.sites if (p := paths.get(n) or fallen.get(n))}
        site = structure.sites[paths.site or ""]
        if _asked_for(structure, via.get(site.name), "answering", wanted) is not None:
            return paths  # what was asked for is not left out silently
        step = structure.conversions.path(site.capabilities, Capability.LOG_DENSITY)
        if step is None:
            return paths
        fallen[site.name] = (*step, structure.conversions.named("unnormalised"))


def learning(structure: Structure, via: Mapping[str, Any], answering: Paths) -> Paths | Refusal:
    """The conversions by which sites are learned: a number whose gradient is that of the log probability.

    Args:
        structure: the program.
        via: conversions to go through, by site.
        answering: those by which queries are answered; sites that go the same way in learning are left out.
    """
    wanted = (Capability.LOG_PROB,)
    paths = require(structure, wanted, wanted, via, purpose="learning")
    if isinstance(paths, Refusal):
        return paths
    return {site: path for site, path in paths.items() if path != answering.get(site)}


_DRAWN = frozenset({Capability.SAMPLE, Capability.RSAMPLE})


def drawing(
    structure: Structure, paths: Mapping[str, tuple[Conversion, ...]], via: Mapping[str, Any] | None = None
) -> tuple[Paths, Exactness] | None:
    """The paths, longer where a site needs more to be drawn, and how exact the draws are; None where one cannot be.

    Args:
        structure: the program.
        paths: so far.
        via: conversions that the user asked for, by site: those that give draws are taken here.
    """
    whole, weakest = dict(paths), Exactness.EXACT
    drawn = _DRAWN
    for site in structure:
        asked = _to_draw(structure, (via or {}).get(site.name))
        if site.factor or (site.capabilities & drawn and asked is None):
            continue
        path = whole.get(site.name, ())
        if not any(c.gives in drawn for c in path):
            has = site.capabilities | {c.gives for c in path}
            step = structure.conversions.path(has, Capability.SAMPLE, asked, at=(site, structure))
            if step is None:
                return None
            path = whole[site.name] = (*path, *step)
        how = exactness_of(c for c in path if c.gives in drawn)
        weakest = min(weakest, how, key=lambda e: e.strength)
    return whole, weakest


def _to_draw(structure: Structure, ways: Any) -> Conversion | None:
    several = () if ways is None else ways if isinstance(ways, (tuple, list)) else (ways,)
    return next((c for c in map(structure.conversions.named, several) if c.gives in _DRAWN), None)


def undrawable(structure: Structure, via: Mapping[str, Any]) -> Refusal | None:
    """A refusal where draws of a site were asked for by a conversion that cannot be used there, if there is such a site."""
    for name, ways in via.items():
        asked = _to_draw(structure, ways)
        site = structure.sites.get(name)
        why = None if asked is None or site is None else asked.unless(site, structure)
        if asked is not None and why is not None:
            return Refusal(
                name,
                Capability.SAMPLE.value,
                f"site {name!r}: via={asked.name!r} cannot be used there: {why}",
            )
    return None


def weakest(kinds: Iterable[Exactness]) -> Exactness:
    """What a number is that has parts of several kinds: exact if all are.

    A bound on one part and an estimate of another make an estimate of a bound, which never passes for one of the truth.

    >>> weakest([Exactness.LOWER_BOUND, Exactness.ESTIMATE]).value
    'lower bound'
    """
    found = set(kinds)
    least = min(found, key=lambda kind: kind.strength, default=Exactness.EXACT)
    bounds = found & {Exactness.LOWER_BOUND, Exactness.UPPER_BOUND}
    if len(bounds) == 2 and least.strength > Exactness.ESTIMATE.strength:
        return Exactness.ESTIMATE
    return bounds.pop() if len(bounds) == 1 and least is Exactness.ESTIMATE else least


def conversions_of(
    structure: Structure, backend: Any, site: str, path: Iterable[str]
) -> tuple[Conversion, ...]:
    """The conversions of an offer's path: those that the backend was given as objects (`via`), else the installed ones."""
    ways = (getattr(backend, "via", None) or {}).get(site, ())
    own = [structure.conversions.named(way) for way in (ways if isinstance(ways, (tuple, list)) else (ways,))]
    return tuple({c.name: c for c in own}.get(name) or structure.conversions.named(name) for name in path)


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
                paths += "".join(
                    f"\n{site}: learned by {' -> '.join(path)}" for site, path in row.answer.learning.items()
                )
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
