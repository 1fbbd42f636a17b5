"""What the documents promise: their code runs, their examples give what they say, their links lead
somewhere.
"""

from __future__ import annotations

import contextlib
import doctest
import importlib.util
import inspect
import json
import re
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import revnet
from ecosystem import admit_torchvision
from revnet._state import environment

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
# Triton, which the kernels need, comes with CUDA builds of torch alone.
WITHOUT = {"__main__"} if importlib.util.find_spec("triton") else {"__main__", "_streams.cuda"}
LIBRARY = ROOT / "src" / "revnet"
FILES = [*LIBRARY.glob("*.py"), *LIBRARY.glob("_*/[!_]*.py")]
MODULES = sorted(
    {".".join(path.relative_to(LIBRARY).with_suffix("").parts) for path in FILES} - WITHOUT
)


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def code_of(page: Path) -> list[tuple[int, str]]:
    """The Python blocks of a page, each with the number of its first line."""
    text = page.read_text()
    blocks = re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, block.start(1)), block[1]) for block in blocks]


def with_marks(page: Path) -> Any:
    """A page, marked where its code imports other libraries."""
    code = "\n".join(code for _, code in code_of(page))
    packages = set(re.findall(r"^(?:from|import) (\w+)", code, re.MULTILINE))
    others = packages - sys.stdlib_module_names - {"numpy", "revnet", "torch"}
    return pytest.param(page, marks=[pytest.mark.ecosystem] if others else [])


@pytest.fixture
def no_process_group() -> Iterator[None]:
    """Ends the process group of a page that failed before it did."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


# torch's own, when it compiles.
@pytest.mark.usefixtures("no_process_group")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*step.. is running without CUDA graph:UserWarning")
@pytest.mark.parametrize("page", [with_marks(page) for page in PAGES if code_of(page)], ids=name)
def test_the_code_of_a_page_runs_and_prints_what_it_says(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    admit_torchvision()
    # Memory filled with NaN is for the tests of the library; here it costs time alone.
    torch.use_deterministic_algorithms(False)
    # Compiled pages show how to compile; what inductor makes of it is for other tests.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    # As a reader would paste them, one block after the other.
    names: dict[str, object] = {}
    for package in re.findall(
        r"^(?:from|import) (\w+)", "\n".join(code for _, code in code_of(page)), re.MULTILINE
    ):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    for line, code in code_of(page):
        if "cuda" in code and not torch.cuda.is_available():
            continue
        # With its place in the page, so that a traceback shows where it failed.
        exec(compile("\n" * line + code, str(page), "exec"), names)
        said = [
            text
            for comment in re.findall(r"print\(.*\)  # (.*)", code)
            for text in comment.split(", then ")
        ]
        assert capsys.readouterr().out.splitlines() == said
        assert said or page.name == "CONTRIBUTING.md", f"{page}:{line} prints nothing"


@pytest.mark.parametrize("module", MODULES)
def test_the_examples_of_docstrings(module: str):
    package = "revnet" if module == "__init__" else f"revnet.{module}"
    # As a reader would have it: the library's names, torch and nn.
    names = {"torch": torch, "nn": nn, "revnet": revnet} | {
        key: getattr(revnet, key) for key in revnet.__all__
    }
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    found = importlib.import_module(package)
    for test in doctest.DocTestFinder(exclude_empty=True).find(found, extraglobs=names):
        report: list[str] = []
        runner.run(test, out=report.append)
        assert not report, "".join(report)


def test_the_reference_has_everything_public():
    text = (ROOT / "docs" / "reference.md").read_text()
    names = re.findall(r"^::: (\S+)$", text, re.MULTILINE)
    testing = importlib.import_module("revnet.testing").__all__
    public = [f"revnet.{key}" for key in revnet.__all__]
    assert sorted(names) == sorted([*public, *(f"revnet.testing.{key}" for key in testing)])


def test_everything_public_has_a_docstring_of_its_own():
    assert [key for key in revnet.__all__ if not inspect.getdoc(getattr(revnet, key))] == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_to_files_resolve(page: Path):
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    links = [
        link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link
    ]
    broken = [link for link in links if link and not (page.parent / link).exists()]
    named = re.findall(r"\b(?:benchmarks|docs|examples|src|tests)/[\w./]*\w\.(?:md|png|py)\b", text)
    broken += [
        path for path in named if not (ROOT / path).exists() and not (page.parent / path).exists()
    ]
    assert broken == []


@pytest.mark.parametrize(("page", "most"), [("README.md", 150), ("CONTRIBUTING.md", 110)])
def test_a_page_is_short(page: str, most: int):
    # The sources of its figures are comments, which nobody reads with it.
    seen = re.sub(r"<!-- figures\n.*?-->\n", "", (ROOT / page).read_text(), flags=re.DOTALL)
    assert len(seen.splitlines()) <= most


def test_the_first_example_is_short():
    assert len(code_of(ROOT / "README.md")[0][1].splitlines()) <= 12


@pytest.mark.parametrize("target", ["train", "test"])
def test_the_two_commands_exist(target: str):
    assert f"make {target}" in (ROOT / "README.md").read_text()
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


# --- how_it_works.md


HOW = ROOT / "docs" / "how_it_works.md"


def test_the_rules_have_the_numbers_of_the_engine_and_an_example_each():
    sections = re.split(r"^##+ ", HOW.read_text(), flags=re.MULTILINE)
    examples = {
        int(section.split(".")[0]): section.count("```python")
        for section in sections
        if re.match(r"\d+\. ", section)
    }
    rules = re.findall(r"^ ?(\d+)\. ", importlib.import_module("revnet._engine").__doc__, re.M)
    assert examples == dict.fromkeys(map(int, rules), 1)


@pytest.mark.parametrize("page", [HOW, ROOT / "CONTRIBUTING.md"], ids=name)
def test_files_that_a_page_sends_to_exist(page: Path):
    files = [str(path) for top in ("src", "tests", "docs") for path in (ROOT / top).rglob("*.py")]
    named = set(re.findall(r"`([\w/]+\.py)`", page.read_text()))
    assert named
    assert [each for each in named if not any(file.endswith(f"/{each}") for file in files)] == []


def drawing(page: str) -> Any:
    """Return the script that draws the picture of a page."""
    path = ROOT / "docs" / f"draw_{page}.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up.
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", ["how_it_works", "long_context"])
def test_a_picture_is_what_its_script_draws(page: str):
    picture = ROOT / "docs" / f"{page}.svg"
    assert picture.read_text(encoding="utf-8") == drawing(page).draw()


def test_the_arithmetic_of_long_contexts_is_within_five_per_cent_of_the_measurements():
    script = drawing("long_context")
    measured = script.measured()
    assert len(measured) >= 6
    for way, blocks, tokens, peak in measured:
        assert abs(peak / way.bytes(blocks, tokens) - 1) <= 0.05, (way.name, blocks, tokens)
    report = ROOT / "benchmarks" / "results" / "long_context_cpu-2core_2026-11-29.md"
    off = re.findall(r"\| ([+-][\d.]+) % \|$", report.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(off) == 16
    assert all(abs(float(each)) <= 5 for each in off)


@pytest.mark.parametrize(
    ("page", "first"), [("README.md", "getting_started.md"), ("CONTRIBUTING.md", "how_it_works.md")]
)
def test_a_page_sends_its_readers_to_the_right_page_first(page: str, first: str):
    links = re.findall(r"\]\((docs/\w+\.md)", (ROOT / page).read_text())
    assert links[0] == f"docs/{first}"


def test_terms_of_the_readme_are_defined_before_they_are_used():
    text = (ROOT / "README.md").read_text()
    for term in ("stream", "branch", "fixed", "float", "replay", "coupling"):
        used = re.search(rf"\b{term}(?:e?s)?\b", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
        defined = re.search(rf"\*\*{term}(?:e?s)?\*\*", text)
        assert used, term
        assert defined, term
        without_code = len(re.sub(r"```.*?```", "", text[: defined.end()], flags=re.DOTALL))
        assert used.start() >= without_code - len(defined[0]), term


@pytest.mark.parametrize("page", [HOW, ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=name)
def test_lines_of_prose_are_at_most_100_columns(page: Path):
    lines = page.read_text().splitlines()
    assert [line for line in lines if len(line) > 100 and not line.startswith("|")] == []


def test_the_worked_change_passes_the_test_that_failed_before(monkeypatch: pytest.MonkeyPatch):
    names: dict[str, Any] = {}
    for _, code in code_of(ROOT / "CONTRIBUTING.md"):
        exec(code, names)
    test, setting = (value for key, value in names.items() if key.startswith(("test", "Determ")))
    others = tuple(each for each in environment.SETTINGS if each.__name__ != setting.__name__)
    for settings in (others, (*others, setting)):
        monkeypatch.setattr(environment, "SETTINGS", settings)
        environment._readers.cache_clear()
        with contextlib.nullcontext() if setting in settings else pytest.raises(AssertionError):
            test()
    environment._readers.cache_clear()


# --- notebooks


NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_a_notebook_is_small_and_has_run(path: Path):
    # `make notebooks` runs them again.
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert cells
    for number, cell in enumerate(cells, start=1):
        assert cell["execution_count"] == number
        outputs = [output for output in cell["outputs"] if output["output_type"] == "stream"]
        assert outputs == cell["outputs"], "an error or a picture"
        assert {output["name"] for output in outputs} == {"stdout"}
        assert all(len(line.rstrip()) <= 100 for line in cell["source"])
    assert path.stat().st_size < 30_000


def test_the_script_makes_a_page_of_a_notebook():
    spec = importlib.util.spec_from_file_location(
        "notebooks", ROOT / "docs" / "site" / "notebooks.py"
    )
    notebooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(notebooks)
    text = notebooks.as_markdown(NOTEBOOKS[0])
    cells = json.loads(NOTEBOOKS[0].read_text())["cells"]
    blocks = [cell for cell in cells if cell["cell_type"] == "code"]
    assert text.count("```python\n") == len(blocks)
    assert "".join(blocks[0]["source"]) in text
    assert "".join(blocks[0]["outputs"][0]["text"]).rstrip() in text
