"""Links from the public names in a text to where the reference describes them."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import griffe

LIBRARY = Path(__file__).parents[2] / "src" / "revnet"
# What no link may stand in: blocks of code, headings, other links, and code of more than a name.
_TOKENS = re.compile(
    r"^```.*?^```$|^(?: {4}|#|>>>|\.\.\. ).*?$|\[[^\]\n]*\](?:\([^)\n]*\)|\[[^\]\n]*\])|`[^`\n]+`",
    re.MULTILINE | re.DOTALL,
)


def _constant(file: str, name: str) -> Any:
    """Return a constant of a module, which is not imported: building the site needs no torch."""
    for node in ast.parse((LIBRARY / file).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == name:
            return ast.literal_eval(node.value)
    raise LookupError(f"{file} has no {name}")


PUBLIC = {name: f"revnet.{name}" for name in _constant("__init__.py", "_MODULES")}
TESTING = {f"testing.{name}": f"revnet.testing.{name}" for name in _constant("testing.py", "__all__")}
NAMES = PUBLIC | TESTING


def link_names(text: str, known: frozenset[str] = frozenset(), every: bool = False) -> str:
    """Return Markdown in which public names in backticks are links.

    Args:
        text: Markdown.
        known: names that stay as they are.
        every: link every mention instead of the first of each name.
    """
    seen = set(known)

    def link(match: re.Match[str]) -> str:
        found = match[0]
        name = found.strip("`").removeprefix("revnet.").removesuffix("()")
        if not found.startswith("`") or name not in NAMES or name in seen:
            return found
        if not every:
            seen.add(name)
        return f"[{found}][{NAMES[name]}]"

    return _TOKENS.sub(link, text)


class Crosslinks(griffe.Extension):
    """Links in docstrings."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Link the names in the docstring of an object, its own excepted."""
        if obj.docstring:
            own = {obj.name, obj.parent.name if obj.parent else ""}
            # The name by which griffe knows a section of examples.
            text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
            obj.docstring.value = link_names(text, frozenset(own), every=True)
