"""Writing a new plugin: a package with a working backend, which installs and passes conformance as it is.

The files are those of `plugins/pgen-template` with the name changed throughout; they lie as plain text in
`pgen/commands/templates/plugin`, and a test holds the two together.
"""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from string import Template

from pgen.errors import OptionError
from pgen.plugins.loader import HOST, scan

_TAKEN = {"ppl"}  # `pgen-ppl` is pgen's own distribution
_FILES = {
    "pyproject.toml.txt": "pyproject.toml",
    "README.md.txt": "README.md",
    "module.py.txt": "$module.py",
    "test_conformance.py.txt": "test_conformance.py",
    "gitignore.txt": ".gitignore",
}


def write_plugin(name: str, folder: str | Path | None = None) -> Path:
    """Write the package of a new plugin, and return its folder.

    The distribution is called `pgen-NAME`, its module `pgen_NAME`, the backend `NAME`. Install it with
    `pip install -e ".[test]"` there, see it with `pgen plugins`, and test it with `python -m pytest`.

    Args:
        name: lower-case words joined by hyphens, such as `nested-sampling`.
        folder: where to write, new or empty; `./pgen-NAME` by default.

    Raises:
        OptionError: the name cannot be a plugin's or is a built-in's, or the folder holds something.
    """
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name):
        raise OptionError(
            f"a plugin cannot be called {name!r}; give lower-case words with hyphens: 'nested-sampling'"
        )
    if name in {p.name for p in scan() if p.builtin} or f"pgen-{name}" == HOST:
        raise OptionError(f"{name!r} is the name of a built-in of pgen; choose another")
    target = Path(f"pgen-{name}" if folder is None else folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise OptionError(f"{target} exists and is not an empty folder; choose another, or empty it")
    words = {"name": name, "distribution": f"pgen-{name}", "module": "pgen_" + name.replace("-", "_")}
    words["Class"] = "".join(part.capitalize() for part in name.split("-")) + "Backend"
    words["version"], words["next_version"] = _series()
    target.mkdir(parents=True, exist_ok=True)
    for source, destination in _FILES.items():
        text = (Path(__file__).parent / "templates" / "plugin" / source).read_text(encoding="utf-8")
        path = target / Template(destination).substitute(words)
        path.write_text(Template(text).substitute(words), encoding="utf-8")
    return target


def _series() -> tuple[str, str]:
    """This minor version of pgen and the next one: what a new plugin asks for."""
    try:
        major, minor = version(HOST).split(".")[:2]
    except PackageNotFoundError:  # run from a source tree
        major, minor = next(p.version for p in scan() if p.builtin).split(".")[:2]
    return f"{major}.{minor}", f"{major}.{int(minor) + 1}"
