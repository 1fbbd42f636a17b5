"""The command is built on what every user of the library has."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
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
            assert node.attr in (*revnet.__all__, "__version__")


ROOT = Path(revnet.app.__file__).parent


def module_of(path: Path) -> str:
    parts = ["revnet", "app", *path.relative_to(ROOT).with_suffix("").parts]
    return ".".join(parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in FILES}


def imports_of(path: Path) -> Iterator[str]:
    """Yield the files of the command that a file imports, wherever in it, but for types alone."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body.clear()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            for name in node.names:
                full = f"{node.module}.{name.name}"
                if full in MODULES:
                    yield full
                elif node.module in MODULES:
                    yield str(node.module)


def test_no_file_imports_itself_by_way_of_others() -> None:
    graph = {module: set(imports_of(path)) for module, path in MODULES.items()}
    assert len(graph["revnet.app.parallel"]) > 5
    assert list(TopologicalSorter(graph).static_order())[-1] == "revnet.app.cli"
