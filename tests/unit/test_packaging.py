"""What an installation holds: every package, and every contract as a file of `broker.schemas`."""

from __future__ import annotations

import configparser
from fnmatch import fnmatch
from importlib import resources
from pathlib import Path

_ROOT = Path(__file__).parents[2]


def _setup() -> configparser.ConfigParser:
    setup = configparser.ConfigParser()
    setup.read(_ROOT / "setup.cfg")
    return setup


def test_every_package_is_installed() -> None:
    folders = {".".join(file.parent.relative_to(_ROOT).parts) for file in (_ROOT / "broker").rglob("__init__.py")}
    assert set(_setup()["options"]["packages"].split()) == folders | {"broker.schemas"}


def test_every_contract_is_installed() -> None:
    patterns = _setup()["options.package_data"]["broker.schemas"].split()
    files = [file.relative_to(_ROOT / "schemas") for file in (_ROOT / "schemas").rglob("*") if file.suffix not in (".py", ".pyc", "")]
    assert files
    for file in files:
        assert any(fnmatch(str(file), pattern) for pattern in patterns), file


def test_the_contracts_are_found_where_code_looks_for_them() -> None:
    schemas = resources.files("broker.schemas")
    assert (schemas / "openapi.json").is_file()
    assert (schemas / "sql" / "0001_catalogue.sql").is_file()
