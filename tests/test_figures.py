"""Every figure of README and docs is one of a report, to its last digit."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent


def checker() -> ModuleType:
    path = ROOT / "docs" / "site" / "figures.py"
    spec = importlib.util.spec_from_file_location("figures", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["figures"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


figures = checker()
PAGES = figures.pages()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "run.md").write_text(
        "# A run\n\n| arm | blocks | ms | peak, MiB | left |\n|---|---|---|---|---|\n"
        "| stored | 24 | 147.25 | 1.251e+04 | 96.25% |\n| **float** | 24 | 193.1 | 608.1 |"
        " +0.010 ± 0.002 |\n\nIt was below 2.4 after 105 seconds.\n\n"
        "## Again\n\n| arm | blocks | ms |\n|---|---|---|\n| float | 24 | 190.0 |\n\n"
        "value float32\n\n| arm | ms |\n|---|---|\n| stored | 3 |\n\n"
        "value bfloat16\n\n| arm | ms |\n|---|---|\n| stored | 2 |\n"
    )
    return tmp_path


def wrong(folder: Path, text: str, *sources: str) -> list[str]:
    comment = "\n\n<!-- figures\n" + "\n".join(sources) + "\n-->\n" if sources else "\n"
    return figures.check(text + comment, "page.md", folder)


def found(text: str) -> list[str]:
    return [figure.text for figure in figures.figures(text)]


# --- the pages


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_figures_of_a_page_are_those_of_reports(page: Path):
    messages = figures.check(page.read_text(), str(page.relative_to(ROOT)))
    assert messages == [], "\n".join(messages)


def changed_digit(text: str, figure: Any) -> str:
    """The page with another last digit in one figure."""
    number = figure.text.partition("e")[0]
    place = figure.start + len(number) - 1
    return text[:place] + str((int(text[place]) + 5) % 10) + text[place + 1 :]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_another_digit_in_any_figure_of_a_report_is_found(page: Path):
    text = page.read_text()
    for known, comment, _ in figures.parts(text):
        given = figures.sources(comment)
        for figure, source in zip(known, given, strict=True):
            if source.value is not None:
                digit = changed_digit(text, figure)
                other = next(each for each in figures.figures(digit) if each.start == figure.start)
                assert not other.equals(source.value, source.percent), (figure, source)


def test_a_changed_digit_of_the_readme_names_its_line_and_its_report():
    text = (ROOT / "README.md").read_text()
    assert "| 24,982 |" in text
    (message,) = figures.check(text.replace("| 24,982 |", "| 24,984 |"), "README.md")
    line = text[: text.index("| 24,982 |")].count("\n") + 1
    source = "rivals_2048x24_h200_2026-11-29"
    assert message.startswith(f"README.md:{line}: 24,984 is 24982 in {source}")


def test_a_changed_digit_of_a_report_is_found(tmp_path: Path):
    for path in figures.REPORTS.glob("*.md"):
        text = path.read_text().replace("| 24,982 |", "| 24,981 |")
        (tmp_path / path.name).write_text(text)
    (message,) = figures.check((ROOT / "README.md").read_text(), "README.md", tmp_path)
    assert "24,982 is 24981" in message


# --- what is a figure


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It takes 1.25 times as long, 12 ms more.", ["1.25", "12"]),
        ("It costs 2 to 3 % of the time, and 3, 6 or 10 bytes.", ["2", "3", "3", "6", "10"]),
        ("Errors of 6e-8 and −0.3, ± 0.01.", ["6e-8", "−0.3", "0.01"]),
        ("| rows | ms | 2.5 |\n|---|---|---|\n| 24 | 1,234 | **× 3** |", ["1,234", "3"]),
        ("| a |\n|---|\n| width 2048 |", []),
        ("24 blocks, 4,096 tokens, width 2048, 2026-11-29, arXiv:1410.8516, γ = 0.9.", []),
        ("`0.5 ms`, torch 2.11 or 2.12, <b title='1.5'>x</b>, [a](b_1.5.md)", []),
        ("    python 1.5\n\n```python\n2.5\n```\n", []),
        ("Width 512, 49 million bytes.", ["49"]),
        ("Six times, 1.5 million tokens, 9.0e-4² of them.", ["1.5", "9.0e-4"]),
    ],
)
def test_what_is_a_figure(text: str, expected: list[str]):
    assert found(text) == expected


# --- what a source may say


@pytest.mark.parametrize(
    ("text", "sources"),
    [
        ("It took 147.3 ms.", ["run", "| stored 24 | ms"]),
        ("It took 147.2 ms.", ["run", "| stored 24 | ms"]),  # a tie is rounded to either side
        ("Peaks: 12,510 MiB and 608 MiB.", ["run", "| stored | peak", "| float 24 | peak"]),
        ("It took 190.0 ms.", ["run # Again", "| float | ms"]),
        ("It took 2 ms.", ["run # value bfloat16", "| stored | ms"]),
        ("It loses 0.010 ± 0.002.", ["run", "| float | left"]),
        ("It is off by 0.2 %.", ["run", "= {float | left[2]}"]),
        ("It reads 96.3 %.", ["run", "| stored 24 | last"]),
        ("It takes 1.31 times as long.", ["run", "= {float 24 193.1 | ms} / {stored 24 | ms}"]),
        ("Below 2.4 after 105 seconds.", ["run", '"below {} after {} seconds"']),
        ("Dropout 0.15, in 2.5 and 3.5.", ["setting", "cited", "version"]),
        ("A resolution of 6e-8.", ["= 2**-24"]),
    ],
)
def test_a_figure_and_its_source(folder: Path, text: str, sources: list[str]):
    assert wrong(folder, text, *sources) == []


@pytest.mark.parametrize(
    ("text", "sources", "message"),
    [
        ("It took 147.1 ms.", ["run", "| stored 24 | ms"], "147.1 is 147.25 in run | stored 24"),
        ("It took 147.3 ms.", ["walk", "| stored | ms"], "no report walk"),
        ("It took 147.3 ms.", ["| stored | ms"], "name a report above"),
        ("It took 147.3 ms.", ["run", "| store | ms"], "no row 'store'"),
        ("It took 147.3 ms.", ["run", "| stored | s"], "no column 's', or several, of arm"),
        ("It took 193.1 ms.", ["run", "| float | ms"], "2 rows 'float': name the heading"),
        ("It took 193.1 ms.", ["run # Never", "| float | ms"], "0 sections"),
        ("It took 105 seconds.", ["run", '"before {} seconds"'], "0 times"),
        ("It took 105 seconds.", ["= __import__('os')"], "only numbers"),
        ("It took 1 s and 2 s.", ["setting"], "2   has no source"),
        ("It took 1 s.", ["setting 2"], "no figure for setting"),
        ("It took 608 s.", [], "608; perhaps run | float 24 … | peak, MiB"),
    ],
)
def test_a_wrong_source_says_what_is_wrong(
    folder: Path, text: str, sources: list[str], message: str
):
    (said,) = wrong(folder, text, *sources)
    assert said.startswith("page.md:1: ")
    assert message in said


def test_a_comment_is_for_the_figures_since_the_one_before(folder: Path):
    first = "It took 1 s.\n\n<!-- figures\nsetting\n-->\n\n"
    assert wrong(folder, first + "It took 147.3 ms.", "run", "| stored 24 | ms") == []
    (said,) = wrong(folder, "It took 1 s.\n\n## Then\n\nIt took 2 s.", "setting")
    assert said.startswith("page.md:1: 1 figures have no source")
