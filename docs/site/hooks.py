"""What MkDocs does not do by itself: pages from outside of docs/, and links between all of them.

In the repository every link is a path from its file, so that it can be followed there. On the site
the README is the first page, reports of measurements are pages, and notebooks become pages; links
are changed to where their targets are. Links to other files lead to the repository, or are plain
text as long as pyproject.toml does not name its address.
"""

from __future__ import annotations

import posixpath
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).parent))

from crosslinks import link_page
from notebooks import as_markdown

ROOT = Path(__file__).parents[2]
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
}
REPORTS = "benchmarks/results"
# Pages that name everything public, or nothing as it is now.
WITHOUT_NAMES = ("changelog.md", "reference.md", "reports")
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
# Badges come from another server, which pages of the site do not ask.
_BADGE = re.compile(r"^!\[[^\]]*\]\(https://img\.shields\.io/.*\)\n", re.MULTILINE)
_PICTURE = re.compile(r'(<img src=")([^"]+)')


def _repository() -> str:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return project["tool"]["hatch"]["metadata"]["hooks"]["custom"]["repository"].rstrip("/")


def _sources() -> dict[str, str]:
    """Return the page for each file of the repository that becomes one from outside of docs/."""
    reports = [path for path in (ROOT / REPORTS).iterdir() if path.suffix in (".md", ".png")]
    return PAGES | {f"{REPORTS}/{path.name}": f"reports/{path.name}" for path in sorted(reports)}


SOURCES = _sources()
ORIGINS = {page: source for source, page in SOURCES.items()}


def on_config(config: Any) -> Any:
    """Name the repository, where it has an address."""
    config.repo_url = _repository() or None
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the pages from outside of docs/, the notebooks, and the list of reports."""
    for source, page in SOURCES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    for path in sorted((ROOT / "docs" / "notebooks").glob("*.ipynb")):
        page = f"notebooks/{path.stem}.md"
        files.append(File.generated(config, page, content=as_markdown(path)))
        # Beside its page, for whoever wants to run it.
        copy = f"notebooks/{path.stem}/{path.name}"
        files.append(File.generated(config, copy, abs_src_path=str(path)))
    files.append(File.generated(config, "reports.md", content=_list_of_reports()))
    return files


def _list_of_reports() -> str:
    lines = [
        "# Measurements",
        "",
        "Each with the command that made it, its hardware and versions.",
        "",
    ]
    for source, page in SOURCES.items():
        if source.startswith(REPORTS) and page.endswith(".md"):
            title = (ROOT / source).read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
            lines.append(f"- [{title}](../{source}) `{Path(page).stem}`")
    return "\n".join(lines) + "\n"


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Change links to where their targets are on the site, and link public names."""
    uri = page.file.src_uri
    origin = ORIGINS.get(uri, f"docs/{uri}")

    def place(target: str) -> str | None:
        """Return the target on the site, as a path from this page, or None."""
        path, hash_, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target) or not path:
            return target
        path = posixpath.normpath(posixpath.join(posixpath.dirname(origin), path))
        found = SOURCES.get(path, path.removeprefix("docs/"))
        if path == REPORTS:
            found = "reports.md"
        if found.endswith(".ipynb"):
            found = found.removesuffix(".ipynb") + ".md"
        if files.get_file_from_path(found):
            return posixpath.relpath(found, posixpath.dirname(uri) or ".") + hash_ + anchor
        if not (ROOT / path).exists():
            return target  # MkDocs will say that it is missing.
        return f"{_repository()}/blob/HEAD/{path}" if _repository() else None

    def link(match: re.Match[str]) -> str:
        sign, words, target = match.groups()
        words = _LINK.sub(link, words)
        found = place(target)
        return words if found is None else f"{sign}[{words}]({found})"

    markdown = _LINK.sub(link, _BADGE.sub("", markdown))
    markdown = _PICTURE.sub(lambda match: match[1] + (place(match[2]) or ""), markdown)
    return markdown if uri.startswith(WITHOUT_NAMES) else link_page(markdown)
