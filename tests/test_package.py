"""The package: its version, its metadata, and what depends on the address of the repository."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

import revnet

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
ADDRESS = "https://example.org/someone/revnet"


def build_hook() -> Any:
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fields(address: str) -> dict[str, Any]:
    """The metadata that follow from an address."""
    metadata: dict[str, Any] = {}
    build_hook().CustomMetadataHook(str(ROOT), {"repository": address}).update(metadata)
    return metadata


def test_the_version_is_the_same_wherever_it_stands():
    from hatchling.metadata.core import ProjectMetadata
    from hatchling.plugin.manager import PluginManager

    built = ProjectMetadata(str(ROOT), PluginManager()).version
    told = subprocess.run(
        [sys.executable, "-m", "revnet", "--version"], capture_output=True, text=True, check=True
    )
    patterns = {
        "CITATION.cff": r"^version: (\S+)$",
        "README.md": r"version = \{(\S+)\}",
        "CHANGELOG.md": r"^## \[(\d\S+)\]",
    }
    found = {
        page: re.search(pattern, (ROOT / page).read_text(), re.MULTILINE)[1]
        for page, pattern in patterns.items()
    }
    assert built == revnet.__version__
    assert told.stdout == f"revnet {revnet.__version__}\n"
    assert found == dict.fromkeys(patterns, revnet.__version__)


def test_an_index_gets_a_readme_without_relative_links():
    text = fields(ADDRESS)["readme"]["text"]
    targets = re.findall(r"""\]\(([^)\s]+)\)|(?:src|href)="([^"]+)""", text)
    targets = [first or second for first, second in targets]
    assert len(targets) > 15
    assert [target for target in targets if not target.startswith("https://")] == []
    assert f'<img src="{ADDRESS}/raw/HEAD/docs/how_it_works.svg"' in text
    assert f"]({ADDRESS}/blob/HEAD/docs/getting_started.md)" in text


@pytest.mark.parametrize("address", [ADDRESS, f"{ADDRESS}/"])
def test_the_urls_follow_from_the_address(address: str):
    urls = fields(address)["urls"]
    assert urls["Repository"] == ADDRESS
    assert all(url.startswith(ADDRESS) for url in urls.values())
    for name in ("Documentation", "Changelog"):
        assert (ROOT / urls[name].removeprefix(f"{ADDRESS}/blob/HEAD/")).exists()


def test_without_an_address_nothing_is_invented():
    metadata = fields("")
    assert metadata["urls"] == {}
    assert metadata["readme"]["text"] == (ROOT / "README.md").read_text()


def test_the_address_stands_in_one_place():
    kinds = ("*.md", "*.cff", "*.yml", "docs/*.md", "docs/notebooks/*.ipynb")
    text = "".join(page.read_text() for kind in kinds for page in ROOT.glob(kind))
    addresses = re.findall(r"https?://[^\s)\"'<>]+", text)
    assert addresses
    assert [address for address in addresses if re.search(r"/revnet\b", address)] == []


def test_what_developers_need_is_no_extra():
    extras = {"app", "icons", "liger", "tensorboard"}
    assert set(PROJECT["project"]["optional-dependencies"]) == extras
    groups = {"dev", "docs", "release", "ecosystem", "peers"}
    assert set(PROJECT["dependency-groups"]) == groups


def test_what_the_groups_name_is_pinned():
    pinned = set(re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    extras = PROJECT["project"]["optional-dependencies"]
    named = [each for group in PROJECT["dependency-groups"].values() for each in group]
    named += [each for extra in extras.values() for each in extra]
    names = {re.match(r"[\w.-]+", each)[0].lower() for each in named}
    assert names - pinned == set()


def test_the_badges_say_what_the_project_says():
    text = (ROOT / "README.md").read_text()
    versions = [
        line.rpartition(" ")[2]
        for line in PROJECT["project"]["classifiers"]
        if re.search(r"Python :: 3\.\d+$", line)
    ]
    assert f"![Python {', '.join(versions)}]" in text
    (torch,) = PROJECT["project"]["dependencies"]
    assert f"![torch {torch.removeprefix('torch>=')} or newer]" in text
    assert f"![{PROJECT['project']['license']} license]" in text
