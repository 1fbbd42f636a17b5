"""The command is built on what every user of the library has."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import revnet
import revnet.app

FILES = sorted(Path(revnet.app.__file__).parent.rglob("*.py"))
# What the library and its program both need, and users do not.
SHARED = ("_execution", "_files", "_sizes")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_only_public_names_of_the_library_are_used(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules = {alias.name for alias in node.names}
            assert not any(module.startswith("revnet.") for module in modules)
        elif isinstance(node, ast.ImportFrom):
            parts = str(node.module).split(".")
            assert node.level == 0
            assert parts[0] != "revnet" or parts[1:2] == ["app"] or parts[1] in SHARED
        elif (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id == "revnet"
        ):
            assert node.attr in revnet.__all__
