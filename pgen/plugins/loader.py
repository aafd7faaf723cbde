"""Finding plugins: what the installed distributions declare, read and judged before any of it is imported.

Stock pluggy loads entry points by importing them one after another: a plugin that cannot be imported takes
the host down, and the second of two equal names is dropped in silence. So pgen reads the metadata first,
decides from it, and imports last, each plugin behind a guard of its own:

    scan()         -> one `Plugin` per entry point of the group "pgen", state "found"
    judge(plugins) -> the same, with those that must not be imported "disabled", "refused" or "failed"
    load(plugin)   -> the module of one that is still "found", or what its import raised

The registry then gives each module to pluggy and asks its hooks.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import tomllib
import traceback
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, TypeVar

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion

T = TypeVar("T")

GROUP = "pgen"
HOST = "pgen-ppl"
PACKAGE = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Plugin:
    """One plugin: what its distribution declares, and what became of it. A row of `pgen plugins`."""

    name: str
    target: str
    """The module, or `module:object`, that implements the hooks."""
    distribution: str
    version: str
    origin: Literal["built-in", "installed", "editable", "given"]
    """Where it comes from; "given" is a module handed to `Registry.of`."""
    requires: tuple[str, ...] = ()
    state: Literal["found", "active", "disabled", "refused", "failed"] = "found"
    """"disabled" by the user, "refused" for a clash with another, "failed" by a fault of its own."""
    why: str = ""
    hooks: tuple[str, ...] = ()
    error: BaseException | None = field(default=None, repr=False, compare=False)

    def __str__(self) -> str:
        return f"plugin {self.name!r} of {self.distribution} {self.version}"

    @property
    def qualified(self) -> str:
        """The name that no other distribution can take: `distribution:name`."""
        return f"{self.distribution}:{self.name}"

    @property
    def builtin(self) -> bool:
        """Whether pgen itself declares it."""
        return self.origin == "built-in"

    @property
    def requirement(self) -> str:
        """The versions of pgen that it asks for, such as ">=0.1,<0.2"; empty where it does not say."""
        asked = (r.specifier for r in requirements(self.requires) if canonicalize_name(r.name) == HOST)
        return ",".join(sorted((str(bound) for bounds in asked for bound in bounds), reverse=True))

    @property
    def report(self) -> str:
        """Who it is, what is wrong, and what to do about it."""
        if self.state == "disabled":
            remedy = "to have it back, take it out of PGEN_DISABLE_PLUGINS (or drop `--plugin no:...`)"
        else:
            verb = "rename it in" if self.state == "refused" else "update"
            remedy = (
                f"to mend it, {verb} or uninstall {self.distribution}; to silence this, set "
                f"PGEN_DISABLE_PLUGINS={self.qualified} (or say `--plugin no:{self.qualified}`)"
            )
        fate = "failed" if self.state == "failed" else f"is {self.state}"
        return f"{self} (entry point {self.name} = {self.target}) {fate}: {self.why}; {remedy}"

    def answers_to(self, name: str) -> bool:
        """Whether `name` means this plugin: its name, `distribution:name`, or its distribution."""
        distribution, colon, plain = name.rpartition(":")
        mine = canonicalize_name(self.distribution)
        if colon:
            return canonicalize_name(distribution) == mine and plain == self.name
        return plain == self.name or canonicalize_name(plain) == mine

    def becomes(
        self, state: Literal["disabled", "refused", "failed"], why: str, error: BaseException | None = None
    ) -> Plugin:
        """The same plugin, left out."""
        return replace(self, state=state, why=why, error=error)


def scan() -> list[Plugin]:
    """Every entry point of the group "pgen" on `sys.path`: built-ins first, then by name and distribution.

    Nothing is imported. A distribution whose metadata cannot be read becomes a plugin that failed, and
    hides no other. As for Python's own imports, the first of two copies of one distribution counts. Where
    pgen runs from a source tree that was never installed, its own entry points come from `pyproject.toml`.
    """
    found: dict[str, list[Plugin]] = {}
    for distribution in importlib.metadata.distributions():
        try:
            declared = distribution.read_text("entry_points.txt") or ""
        except (OSError, UnicodeDecodeError):
            continue
        if re.search(rf"^\s*\[\s*{GROUP}\s*\]", declared, re.MULTILINE):
            plugins = list(_declared(distribution))
            if plugins:
                found.setdefault(canonicalize_name(plugins[0].distribution), plugins)
    if HOST not in found:
        found[HOST] = list(_from_source_tree())
    return sorted(
        (plugin for plugins in found.values() for plugin in plugins),
        key=lambda p: (not p.builtin, p.name, p.distribution),
    )


def _declared(distribution: importlib.metadata.Distribution) -> Iterator[Plugin]:
    """What one distribution declares in the group, whatever else is wrong with its metadata."""
    try:
        name = distribution.metadata["Name"] or "an unnamed distribution"
        version = distribution.metadata["Version"] or "(no version)"
        requires = tuple(distribution.requires or ())
        url = json.loads(distribution.read_text("direct_url.json") or "{}")
        origin = "editable" if url.get("dir_info", {}).get("editable") else "installed"
        if canonicalize_name(name) == HOST:
            origin = "built-in"
        for point in distribution.entry_points.select(group=GROUP):
            yield Plugin(point.name, point.value, name, version, origin, requires)
    except Exception as error:  # metadata is a stranger's text: anything may be wrong with it
        folder = Path(getattr(distribution, "_path", "somewhere")).name
        why = f"its metadata cannot be read: {cause(error)}"
        yield Plugin("?", "?", folder, "(version unknown)", "installed", state="failed", why=why)


def _from_source_tree() -> Iterator[Plugin]:
    """pgen's own entry points where it has no metadata: read from the pyproject.toml beside it."""
    try:
        project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
    except (OSError, tomllib.TOMLDecodeError, KeyError):
        return
    if project.get("name") == HOST:
        for name, target in project["entry-points"][GROUP].items():
            yield Plugin(name, target, HOST, project["version"], "built-in")


def judge(plugins: Iterable[Plugin], disabled: Collection[str] = ()) -> list[Plugin]:
    """The plugins in the same order, those that must not be imported with their state and why.

    In this order: disabled by the user; the name of a built-in; a name that two distributions claim (both
    are refused: neither spelling nor `sys.path` may decide); requirements that are not met here.
    """
    plugins = [
        p.becomes("disabled", "the user disabled it") if any(p.answers_to(name) for name in disabled) else p
        for p in plugins
    ]
    reserved = {p.name for p in plugins if p.builtin}
    claims = Counter(p.name for p in plugins if p.state == "found")

    def verdict(plugin: Plugin) -> Plugin:
        if plugin.state != "found" or plugin.builtin:
            return plugin
        if plugin.name in reserved:
            return plugin.becomes("refused", f"{plugin.name!r} is the name of a built-in plugin of pgen")
        if claims[plugin.name] > 1:
            rivals = [p for p in plugins if p.name == plugin.name and p.state == "found"]
            return plugin.becomes("refused", clash(rivals, "call themselves", plugin.name))
        unmet = unmet_requirement(plugin)
        return plugin.becomes("failed", unmet) if unmet else plugin

    return [verdict(plugin) for plugin in plugins]


def clash(rivals: Iterable[Plugin], claim: str, name: str) -> str:
    """Says that several plugins claim one name, and how to choose."""
    rivals = list(rivals)
    who = " and ".join(f"{p.distribution} {p.version}" for p in rivals)
    write = " or ".join(repr(f"{p.distribution}:{name}") for p in rivals)
    return f"{who} {claim} {name!r}, so the plain name means neither: write {write}"


def unmet_requirement(plugin: Plugin) -> str | None:
    """The first requirement of its distribution that this environment does not meet, or None."""
    for requirement in requirements(plugin.requires):
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            if canonicalize_name(requirement.name) == HOST:  # pgen runs from a source tree
                continue
            return f"it requires {requirement}, which is not installed"
        try:
            fits = requirement.specifier.contains(version, prereleases=True)
        except InvalidVersion:
            fits = False
        if not fits:
            return f"it requires {requirement}, but {requirement.name} {version} is installed"
    return None


def requirements(lines: Iterable[str]) -> Iterator[Requirement]:
    """The requirements that hold here: not those of extras, nor those whose markers do not apply.

    A line that is no requirement is passed over: an installer has judged it, and nothing can be checked.
    """
    for line in lines:
        try:
            requirement = Requirement(line)
        except InvalidRequirement:
            continue
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield requirement


def load(plugin: Plugin) -> tuple[object, BaseException | None]:
    """The object that the plugin's entry point names, or what importing it raised."""
    return guarded(importlib.metadata.EntryPoint(plugin.name, plugin.target, GROUP).load)


def guarded(call: Callable[[], T]) -> tuple[T | None, BaseException | None]:
    """The result of a stranger's code, or what it raised.

    `sys.exit` and exceptions that libraries derive from BaseException are failures of the plugin too; only
    the user's own Ctrl-C gets through. What no guard in this process can stop (`os._exit`, a segmentation
    fault, an endless loop) is for `pgen plugins check`.
    """
    try:
        return call(), None
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return None, error


def cause(error: BaseException) -> str:
    """One line: what was raised, and the last line of the plugin's own that led there."""
    text = " ".join(str(error).split())
    line = f"{type(error).__name__}: {text}" if text else type(error).__name__
    not_theirs = (str(PACKAGE), str(Path(importlib.__file__).parent), "<frozen")
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(not_theirs)]
    return f"{line} ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else line
