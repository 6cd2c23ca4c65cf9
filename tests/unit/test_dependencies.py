"""What an installation pulls in, and whether that is what was decided: no import that is not declared, nothing declared that is not used,
versions that fit each other, licences that may be used with ours. All of it by what is installed; nothing is asked of a network.

Known vulnerabilities are not looked for here: a list of them would be old the day after. ``pip-audit`` asks for today's (README).
"""

from __future__ import annotations

import ast
import configparser
import re
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
OURS = "transfer-broker"

PULLED_IN = {
    "aiohappyeyeballs", "aiosignal", "attrs", "cffi", "frozenlist", "idna", "markdown-it-py", "mdurl", "propcache", "pycparser",
    "pygments", "tenacity", "typing-extensions",
}  # fmt: skip
"""What the plain install's own dependencies need. A new name here is a decision: somebody else's code runs beside the keys."""

PERMISSIVE = re.compile(r"MIT|BSD|Apache|Python Software Foundation|PSF|ISC|Zlib|CNRI", re.IGNORECASE)


def needs(name: str, extras: frozenset[str] = frozenset()) -> Iterator[Requirement]:
    """What a distribution asks for on this machine."""
    for text in metadata.requires(name) or ():
        requirement = Requirement(text)
        environments = [{"extra": extra} for extra in extras] or [{"extra": ""}]
        if requirement.marker is None or any(requirement.marker.evaluate(environment) for environment in environments):
            yield requirement


def closure() -> dict[str, list[Requirement]]:
    """Every distribution of the plain install, with all that is asked of it."""
    asked: dict[str, list[Requirement]] = {}
    waiting = [(OURS, frozenset[str]())]
    seen = set()
    while waiting:
        name, extras = waiting.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        for requirement in needs(name, extras):
            inner = canonicalize_name(requirement.name)
            asked.setdefault(inner, []).append(requirement)
            waiting.append((inner, frozenset(requirement.extras)))
    return asked


def declared() -> set[str]:
    return {canonicalize_name(requirement.name) for requirement in needs(OURS)}


def optional(extra: str) -> set[str]:
    """What an extra of ours adds for a command that says so when it is missing."""
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    return {canonicalize_name(Requirement(line).name) for line in settings["options.extras_require"][extra].split("\n") if line}


def imported() -> dict[str, set[str]]:
    """The distributions that modules of the package import at all, and where."""
    providers = metadata.packages_distributions()
    found: dict[str, set[str]] = {}
    for file in (ROOT / "broker").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [each.name for each in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
            for top in {name.partition(".")[0] for name in names} - {"broker", "__future__"} - sys.stdlib_module_names:
                (provider,) = {canonicalize_name(name) for name in providers.get(top, [f"nobody ({top})"])}
                found.setdefault(provider, set()).add(str(file.relative_to(ROOT)))
    return found


def test_every_import_is_declared() -> None:
    undeclared = {name: files for name, files in imported().items() if name not in declared()}
    assert undeclared == {key: {"broker/cli/glance_source.py"} for key in optional("openstack")}


def test_everything_declared_is_imported() -> None:
    assert declared() - set(imported()) == set()


def test_the_plain_install_pulls_in_what_was_decided() -> None:
    assert set(closure()) - declared() <= PULLED_IN


@pytest.mark.parametrize("name", sorted(closure()))
def test_versions_fit_each_other(name: str) -> None:
    installed = metadata.version(name)
    for requirement in closure()[name]:
        assert requirement.specifier.contains(installed, prereleases=True), f"{name} {installed} is not {requirement}"


@pytest.mark.parametrize("name", sorted(closure()))
def test_licences_are_permissive(name: str) -> None:
    about = metadata.metadata(name)
    said = [about.get("License-Expression") or "", *(line for line in about.get_all("Classifier") or () if line.startswith("License ::"))]
    said.append((about.get("License") or "").partition("\n")[0])
    assert any(PERMISSIVE.search(text) for text in said), f"{name}: {said}"


def test_what_is_declared_has_a_lowest_version() -> None:
    for requirement in needs(OURS):
        assert [specifier.operator for specifier in requirement.specifier] == [">="], f"{requirement}: a lowest version, and no highest"
