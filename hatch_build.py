"""Metadata of the package that follow from the address of the repository.

The address stands in pyproject.toml alone: `repository`, below
`[tool.hatch.metadata.hooks.custom]`. From it come the project's URLs and, because a package index
does not know the repository, absolute links in place of the README's relative ones. Without an
address there are no URLs, and links stay as they are.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

PICTURES = (".png", ".svg")
# The target of a link or picture in Markdown, and of a picture in HTML: all that the README uses.
_TARGET = re.compile(r"""(\]\(|src="|href=")(?![a-z]+:|#)([^)"\s]+)""")


def project_urls(repository: str) -> dict[str, str]:
    """Return the project's URLs, by the names that package indexes show."""
    if not repository:
        return {}
    file = f"{repository}/blob/HEAD"
    return {
        "Repository": repository,
        "Documentation": f"{file}/docs/getting_started.md",
        "Changelog": f"{file}/CHANGELOG.md",
        "Issues": f"{repository}/issues",
    }


def with_absolute_links(text: str, repository: str) -> str:
    """Return Markdown whose links to files of the repository are absolute."""
    if not repository:
        return text

    def absolute(match: re.Match[str]) -> str:
        start, target = match.groups()
        kind = "raw" if target.endswith(PICTURES) else "blob"
        return f"{start}{repository}/{kind}/HEAD/{target}"

    return _TARGET.sub(absolute, text)


class CustomMetadataHook(MetadataHookInterface):
    """Sets `readme` and `urls`."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Add the fields that follow from the address."""
        repository = self.config["repository"].rstrip("/")
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        metadata["readme"] = {
            "content-type": "text/markdown",
            "text": with_absolute_links(text, repository),
        }
        metadata["urls"] = project_urls(repository)
