"""Check that the figures of README and docs are those of reports: `python docs/site/figures.py`.

A figure is a number with a unit of measurement or decimals, and every number in a cell of a table
that holds nothing else, the first column and the head excepted. Exempt are code, inline code,
versions, papers' numbers, and parameters behind `=`. A comment below a paragraph, list or table
names the sources of all figures since the comment or heading before it, in their order:

    <!-- figures
    time_vs_depth_h100_2026-11-22 # Time and memory
    | eager-2048 fixed | ms | peak
    | eager-2048 float | target[2]
    = {eager-2048 fixed | ms} / {eager-2048 stored | ms}
    "below 2.4 bits per byte on held-out text **after {} seconds**"
    setting 2
    -->

The first line names a report below benchmarks/results and, where its tables have equal rows, the
beginning of the section's heading or of the line above the table. A line with `|` names a row by
the text of its first cells and then one column for each figure, by the beginning of its name or
`last`; a cell of two numbers is two figures, and `name[2]` the second. `=` is arithmetic. A text
between quotation marks stands in the report, with `{}` for each figure. Figures that nothing
measured are `setting` (somebody chose them), `cited` (the page names the paper) or `version`, with
their number if there are several.
"""

from __future__ import annotations

import ast
import math
import operator
import re
import sys
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path

ROOT = Path(__file__).parents[2]
REPORTS = ROOT / "benchmarks" / "results"
KINDS = ("setting", "cited", "version")

_NUMBER = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:e[+-]?\d+)?"
_FIGURE = re.compile(
    rf"(?<![\w.,/^°-])(?P<sign>(?<![\w)])[+−-])?(?P<number>{_NUMBER})(?![A-Za-z_])"
)
_UNIT = re.compile(
    r"\s?(?:%|(?:ms|µs|s|seconds?|min|minutes?|hours?|[KMGT]i?B|bytes|nats?|tokens/s|"
    r"tokens per second|bits per|million|points)(?![\w^]))"
)
_CONNECTIVE = re.compile(r"\s*(?:,|to|and|or|–|±|/)\s*[×≈]?\s*")
# What stands in a numeric cell beside numbers and their units.
_DECORATION = re.compile(r"[\s*×≈<>≤≥±+−–,;/()¹²³⁴⁵-]|to|and")
# A number after one of these is a version.
_LIBRARIES = (
    "accelerate|bitsandbytes|captum|diffusers|e3nn|lightning|peft|pip|python|release|timm|torch|"
    "torch_geometric|torchao|torchvision|transformers|trl|vit-pytorch|x-transformers"
)
_HIDDEN = re.compile(
    r"^```.*?^```$"  # code
    r"|(?:\A|(?<=\n\n)|(?<=-->\n))(?: {4}\S[^\n]*\n?|\n(?= {4}))+"  # indented code
    r"|<!--.*?-->|<[a-z/][^>]*>"
    r"|`[^`\n]*`"
    r"|\]\([^)\s]*\)|\]\[[^\]]*\]"  # where links lead
    r"|\b(?:arXiv|doi):\S+"
    r"|(?<=[\w)] )=\s*\**[+−-]?\d[\d.,e+-]*\d(?!\s?%|\s?ms)"  # parameters
    r"|\b(?:dropout|momentum|Momentum|at rates?|budget) \d\.\d+"
    rf"|\b(?i:{_LIBRARIES})(?:,| from| \()?(?: \(?\d+\.\d+(?:\.\d+)?(?:,| to| and| or)?)+",
    re.MULTILINE | re.DOTALL,
)
_COMMENT = re.compile(r"<!-- figures\n(.*?)-->", re.DOTALL)
_OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
    ast.USub: operator.neg,
}


class SourceError(ValueError):
    """Raised for a source that leads to no number."""


@dataclass(frozen=True)
class Figure:
    """A number on a page."""

    start: int
    end: int
    text: str  # as written, with its sign
    percent: bool
    scale: int  # 1,000,000 for millions

    def equals(self, value: Decimal, percent: bool) -> bool:
        """Check that the number is this value, rounded to the digits that it has."""
        written = Decimal(self.text.replace(",", "").replace("−", "-"))
        if self.text[0] not in "+−-":
            value = abs(value)
        if self.percent and not percent:
            value *= 100
        half = Decimal((0, (5,), int(written.as_tuple().exponent) - 1))
        return abs(written - value / self.scale) <= half


@dataclass(frozen=True)
class Source:
    """Where a figure is from: its value, or none where nothing measured it."""

    name: str
    value: Decimal | None = None
    percent: bool = False


# --- pages


def figures(text: str) -> list[Figure]:
    """Return the figures of a page, in their order."""
    # Characters in the place of what is hidden, so that positions stay.
    seen = _HIDDEN.sub(lambda match: re.sub(r"[^\n|]", "\x00", match[0]), text)
    found: list[Figure] = []
    for part in re.finditer(r"^\|.*$|^#.*$|(?:^[^|#\n].*\n?)+", seen, re.MULTILINE):
        if part[0].startswith("|"):
            found += _of_a_row(seen, part)
        elif not part[0].startswith("#"):
            found += _of_prose(seen, part.start(), part.end())
    return found


def _of_a_row(text: str, line: re.Match[str]) -> list[Figure]:
    after = text[line.end() + 1 : line.end() + 4]
    if re.match(r"\|[\s:]*-", line[0]) or re.match(r"\|[\s:]*-", after):
        return []  # the line below the head, and the head
    found: list[Figure] = []
    start = line.start()
    for index, cell in enumerate(line[0].split("|")):
        end = start + len(cell)
        rest = re.sub(rf"{_NUMBER}(?:{_UNIT.pattern})?", "", cell)
        if index > 1 and re.search(r"\d", cell) and not _DECORATION.sub("", rest).strip("\x00"):
            found += [_figure(text, m) for m in _FIGURE.finditer(text, start, end)]
        elif index > 0:
            found += _of_prose(text, start, end)
        start = end + 1
    return found


def _of_prose(text: str, start: int, end: int) -> list[Figure]:
    found: list[Figure] = []
    following, shared = end, False
    for match in reversed(list(_FIGURE.finditer(text, start, end))):
        # In "2 to 3 %" the first number has the unit of the second.
        joint = _CONNECTIVE.fullmatch(text, match.end(), following)
        unit = _UNIT.match(text, match.end())
        shared = bool(unit or (shared and joint and joint[0].strip()))
        if shared or re.search(r"[.e]", match["number"]):
            found.append(_figure(text, match))
        following = match.start()
        if unit and "million" in unit[0]:
            shared = False  # "width 512, 49 million bytes"
    return found[::-1]


def _figure(text: str, match: re.Match[str]) -> Figure:
    unit = _UNIT.match(text, match.end())
    name = unit[0].strip() if unit else ""
    scale = 1_000_000 if name == "million" else 1
    return Figure(match.start(), match.end(), match[0], name == "%", scale)


# --- reports


class Report:
    """The tables and the text of one report."""

    def __init__(self, name: str, folder: Path = REPORTS) -> None:
        """Read a report, named by its file without `.md` and perhaps `# heading`."""
        name, _, heading = (part.strip() for part in name.partition("#"))
        path = folder / f"{name}.md"
        if not path.is_file():
            raise SourceError(f"there is no report {name} in {folder.name}/")
        self.name, self.text = name, path.read_text(encoding="utf-8")
        if heading:
            self.name += f" # {heading}"
            self.text = _section(self.text, heading, name)
        self.tables = [
            [_cells(line) for line in table[0].splitlines()]
            for table in re.finditer(r"(?:^\|.*\n?)+", self.text, re.MULTILINE)
        ]

    def cell(self, row: str, column: str) -> list[tuple[Decimal, bool]]:
        """Return the numbers of one cell, each with whether it is a percentage."""
        name, index = re.fullmatch(r"(.*?)(?:\[(\d+)\])?", column).groups()  # type: ignore[union-attr]
        found = [
            (head, cells)
            for head, *rows in self.tables
            for cells in rows
            if row in (" ".join(cells[: k + 1]) for k in range(len(cells)))
        ]
        if not found:
            raise SourceError(f"{self.name} has no row {row!r}")
        places = [(_column(head, name), cells) for head, cells in found]
        if all(place is None for place, _ in places):
            head = ", ".join(found[0][0])
            raise SourceError(f"{self.name} has no column {name!r}, or several, of {head}")
        values = {cells[place] for place, cells in places if place is not None}
        if len(values) > 1:
            raise SourceError(f"{self.name} has {len(values)} rows {row!r}: name the heading")
        numbers = _numbers(values.pop())
        if not numbers:
            raise SourceError(f"{self.name} | {row} | {column} holds no number")
        return [numbers[int(index) - 1]] if index else numbers

    def quoted(self, pattern: str) -> list[tuple[Decimal, bool]]:
        """Return the numbers that stand for `{}` in a text of the report."""
        parts = (re.escape(part) for part in " ".join(pattern.split()).split("{}"))
        number = rf"([+−-]?{_NUMBER}\s?%?)"
        found = re.findall(number.join(parts), " ".join(self.text.split()))
        if len(found) != 1:
            raise SourceError(f"{self.name} has the text {pattern!r} {len(found)} times")
        texts = found[0] if isinstance(found[0], tuple) else found
        return [_numbers(each)[0] for each in texts]


def _section(text: str, start: str, report: str) -> str:
    """Return a section by its heading, or one table by the line above that introduces it."""
    sections = re.split(r"^#+ ", text, flags=re.MULTILINE)
    found = [each for each in sections if each.partition("\n")[0].strip() == start]
    found = found or [each for each in sections if each.startswith(start)]
    if not found:
        table = rf"^{re.escape(start)}.*\n(?:[^|].*\n|\n)*(?:\|.*\n?)+"
        found = re.findall(table, text, re.MULTILINE)
    if len(found) != 1:
        raise SourceError(f"{report} has {len(found)} sections that begin with {start!r}")
    return found[0]


def _cells(line: str) -> list[str]:
    return [cell.replace("**", "").strip() for cell in line.strip().strip("|").split("|")]


def _column(head: list[str], name: str) -> int | None:
    if name == "last":  # often without a name
        return len(head) - 1
    found = [i for i, each in enumerate(head) if each == name]
    found = found or [i for i, each in enumerate(head) if each.startswith(name)]
    return found[0] if len(found) == 1 else None


def _numbers(cell: str) -> list[tuple[Decimal, bool]]:
    pattern = rf"(?<![\w.])([+−-]?{_NUMBER})\s?(%?)"
    return [
        (Decimal(number.replace(",", "").replace("−", "-")), percent == "%")
        for number, percent in re.findall(pattern, cell)
    ]


# --- sources


def sources(comment: str, folder: Path = REPORTS) -> list[Source]:
    """Return the sources that a comment lists, one for each figure."""
    report: Report | None = None
    found: list[Source] = []
    for line in filter(None, map(str.strip, comment.splitlines())):
        if line.split()[0] in KINDS:
            kind, _, count = line.partition(" ")
            found += [Source(kind)] * int(count or 1)
        elif line.startswith("="):
            found.append(_computed(line, report))
        elif line[0] not in '|"':
            report = Report(line, folder)
        elif report is None:
            raise SourceError(f"name a report above the line {line!r}")
        elif line.startswith("|"):
            row, *columns = _cells(line)
            found += [
                Source(f"{report.name} | {row} | {column}", *number)
                for column in columns
                for number in report.cell(row, column)
            ]
        else:
            numbers = report.quoted(line.strip('"'))
            found += [Source(f"{report.name} {line}", *number) for number in numbers]
    return found


def _computed(line: str, report: Report | None) -> Source:
    values: list[float] = []

    def take(match: re.Match[str]) -> str:
        if report is None:
            raise SourceError(f"name a report above the line {line!r}")
        row, column = _cells(match[1])
        values.append(float(report.cell(row, column)[0][0]))
        return f" v{len(values) - 1} "

    formula = re.sub(r"\{(.*?)\}", take, line.lstrip("= ")).strip()
    try:
        value = _value(ast.parse(formula, mode="eval").body, values)
        # The digits of a double that mean something.
        return Source(line, Decimal(f"{value:.12g}"))
    except (SyntaxError, ZeroDivisionError, InvalidOperation, KeyError) as error:
        raise SourceError(f"{line!r} cannot be computed: {error}") from None


def _value(node: ast.expr, values: list[float]) -> float:
    match node:
        case ast.Constant(value=int() | float() as number):
            return float(number)
        case ast.Name(id=name) if re.fullmatch(r"v\d+", name):
            return values[int(name[1:])]
        case ast.Call(func=ast.Name(id="log2"), args=[argument]):
            return math.log2(_value(argument, values))
        case ast.UnaryOp():
            return _OPERATORS[type(node.op)](_value(node.operand, values))
        case ast.BinOp():
            left, right = _value(node.left, values), _value(node.right, values)
            return _OPERATORS[type(node.op)](left, right)
    raise SyntaxError(f"only numbers, + - * / ** and log2, not {ast.unparse(node)}")


# --- the check


def parts(text: str) -> list[tuple[list[Figure], str | None, int]]:
    """Return the figures of each part of a page, its comment, and where the comment belongs."""
    known = figures(text)
    plain = re.sub(r"^```.*?^```$", lambda m: " " * len(m[0]), text, flags=re.M | re.S)
    marks = [(m.start(), m.end(), m[1]) for m in _COMMENT.finditer(plain)]
    marks += [(m.start(), m.end(), None) for m in re.finditer(r"^#+ .*$", plain, re.MULTILINE)]
    marks.append((len(text), len(text), None))
    found, before = [], 0
    for start, end, comment in sorted(marks, key=lambda mark: mark[0]):
        found.append(([each for each in known if before <= each.start < start], comment, start))
        before = end
    return [each for each in found if each[0] or each[1] is not None]


def check(text: str, name: str, folder: Path = REPORTS) -> list[str]:
    """Return what is wrong with the figures of a page, a message each."""
    wrong = []
    for known, comment, place in parts(text):
        line = text.count("\n", 0, known[0].start if known else place) + 1
        if comment is None:
            wrong.append(f"{name}:{line}: {_missing(known, folder)}")
            continue
        try:
            given = sources(comment, folder)
        except SourceError as error:
            wrong.append(f"{name}:{line}: {error}")
            continue
        wrong += _differences(text, name, known, given)
    return wrong


def _differences(text: str, name: str, known: list[Figure], given: list[Source]) -> list[str]:
    pairs = list(zip(known, given, strict=False))
    wrong = [
        (figure, source)
        for figure, source in pairs
        if source.value is not None and not figure.equals(source.value, source.percent)
    ]
    if len(known) == len(given):
        lines = [text.count("\n", 0, figure.start) + 1 for figure, _ in wrong]
        return [
            f"{name}:{line}: {figure.text} is {source.value:f} in {source.name}"
            for line, (figure, source) in zip(lines, wrong, strict=True)
        ]
    line = text.count("\n", 0, known[0].start) + 1 if known else 1
    listed = [f"{name}:{line}: {len(known)} figures and {len(given)} sources, in order:"]
    for figure, source in pairs:
        sign = "≠" if (figure, source) in wrong else " "
        listed.append(f"    {figure.text:>12} {sign} {source.name}")
    listed += [f"    {figure.text:>12}   has no source" for figure in known[len(given) :]]
    listed += [f"    no figure for {each.name}" for each in given[len(known) :]]
    return ["\n".join(listed)]


def _missing(known: list[Figure], folder: Path) -> str:
    lines = [
        f"{len(known)} figures have no source. Below them, before the next heading, add a comment "
        "with a line for each (docs/site/figures.py says how):",
        "    <!-- figures",
        "    NAME OF A REPORT # HEADING",
    ]
    lines += [f"    | ROW | COLUMN      for {each.text}{_hint(each, folder)}" for each in known]
    return "\n".join([*lines, "    -->"])


def _hint(figure: Figure, folder: Path, most: int = 2) -> str:
    """Return where reports have such a number, if it has enough digits to mean something."""
    if len(re.sub(r"\D", "", figure.text).strip("0")) < 3:
        return ""
    found = []
    for path in sorted(folder.glob("*.md")):
        report = Report(path.stem, folder)
        for head, *rows in report.tables:
            for cells in rows:
                for i, cell in enumerate(cells[1:], start=1):
                    if any(figure.equals(*number) for number in _numbers(cell)):
                        column = head[i] if i < len(head) else "?"
                        found.append(f"{path.stem} | {' '.join(cells[:2])} … | {column}")
    return f"; perhaps {' or '.join(found[:most])}" if found else ""


def pages() -> list[Path]:
    """Return README and the pages of docs."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def main() -> None:
    """Print what is wrong, on all pages or on those that are named."""
    chosen = [Path(name).resolve() for name in sys.argv[1:]] or pages()
    wrong = [
        message
        for page in chosen
        for message in check(page.read_text(encoding="utf-8"), str(page.relative_to(ROOT)))
    ]
    print("\n".join(wrong))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
