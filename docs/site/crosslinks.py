"""Links from the public names in a text to where the reference describes them."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import griffe

LIBRARY = Path(__file__).parents[2] / "src" / "revnet"
# What no link may stand in: code of more than a name, headings, and other links.
_LINKS_AND_CODE = r"^(?:#|>>>|\.\.\. ).*?$|\[[^\]\n]*\](?:\([^)\n]*\)|\[[^\]\n]*\])|`[^`\n]+`"
_PAGE = re.compile(rf"^```.*?^```$|^ {{4}}.*?$|{_LINKS_AND_CODE}", re.MULTILINE | re.DOTALL)
# Indented lines of a docstring describe parameters.
_DOCSTRING = re.compile(rf"^ *(?:>>>|\.\.\. ).*?$|{_LINKS_AND_CODE}", re.MULTILINE)


def _constant(file: str, name: str) -> Any:
    """Return a constant of a module, which is not imported: building the site needs no torch."""
    for node in ast.parse((LIBRARY / file).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == name:
            return ast.literal_eval(node.value)
    raise LookupError(f"{file} has no {name}")


PUBLIC = {name: f"revnet.{name}" for name in _constant("__init__.py", "_MODULES")}
TESTING = {
    f"testing.{name}": f"revnet.testing.{name}" for name in _constant("testing.py", "__all__")
}
NAMES = PUBLIC | TESTING


def link_page(text: str) -> str:
    """Return Markdown in which the first mention of each public name in backticks is a link."""
    seen: set[str] = set()

    def link(match: re.Match[str]) -> str:
        name = _name(match[0])
        if not name or name in seen:
            return match[0]
        seen.add(name)
        return f"[{match[0]}][{NAMES[name]}]"

    return _PAGE.sub(link, text)


def link_docstring(text: str, own: set[str]) -> str:
    """Return a docstring in which public names are links, but those of the object itself."""

    def link(match: re.Match[str]) -> str:
        name = _name(match[0])
        return f"[{match[0]}][{NAMES[name]}]" if name and name not in own else match[0]

    return _DOCSTRING.sub(link, text)


def _name(code: str) -> str:
    """Return the public name that a piece of code in backticks is, or nothing."""
    name = code.strip("`").removeprefix("revnet.").removesuffix("()")
    return name if code.startswith("`") and name in NAMES else ""


class Crosslinks(griffe.Extension):
    """Links in docstrings."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Link the names in the docstring of an object, its own excepted."""
        if obj.docstring:
            own = {obj.name, obj.parent.name if obj.parent else ""}
            # The name by which griffe knows a section of examples.
            text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
            obj.docstring.value = link_docstring(text, own)
