"""What type checkers tell users, and what `help` does."""

from __future__ import annotations

import os
import pydoc
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import Tensor, nn

import revnet
from revnet._execution import EXECUTIONS, ExecutionName

# Each line that ends in `# TYPE` reveals TYPE; each that ends in `# error` is refused.
USER = """
import torch
from torch import Tensor, nn

import revnet

pairs = [(nn.Linear(8, 8), nn.Linear(8, 8))]
x = torch.randn(2, 8)
net = revnet.ReversibleSequence(pairs, split="chunk", merge="concat", streams="fixed")
reveal_type(net(x))  # Tensor
reveal_type(net(x, mask=None))  # Tensor
reveal_type(net.with_aux(x))  # tuple[Tensor, dict[str, Any]]
reveal_type(revnet.SequentialSequence(pairs)(x))  # Tensor
reveal_type(revnet.ReversibleBlock(*pairs[0])(x, x))  # tuple[Tensor, Tensor]
reveal_type(net.inverse(x, x))  # tuple[Tensor, Tensor]
steps = revnet.Reversible([revnet.Step(nn.Linear(8, 8), target=0, source=1)])
reveal_type(steps(x, x, x))  # tuple[Tensor, Tensor, Tensor]
reveal_type(steps.with_aux(x, x)[0])  # tuple[Tensor, Tensor]
reveal_type(steps({"a": x}, [x]))  # tuple[dict[str, Tensor], list[Tensor]]
many: list[Tensor] = [x, x]
reveal_type(steps(*many))  # tuple[Tensor, ...]
plan = revnet.plan(net, x, "8GiB")
reveal_type(plan)  # Plan
reveal_type(revnet.plan(net, x, ["25%", 2**30]))  # list[Plan]
net.execution = plan
net.execution = "offload"
net.execution = ["store", "invert"]
net.streams = revnet.Fixed()
reveal_type(revnet.measure_memory(net, x).peak_bytes)  # int
reveal_type(revnet.convert(nn.Linear(8, 8), rule="two-stream").bits)  # int | list[int]
net.execution = "explode"  # error
net.streams = "integers"  # error
revnet.ReversibleSequence(pairs, split="half")  # error
revnet.ReversibleSequence(pairs, merge="product")  # error
revnet.ReversibleSequence(pairs, determinism_check="always")  # error
revnet.Reversible([], execution=["stored"])  # error
revnet.convert(nn.Linear(8, 8), rule="momenta")  # error
net(3)  # error
"""
LINES = USER.splitlines()
REVEALED = {
    number: line.rpartition("  # ")[2]
    for number, line in enumerate(LINES, start=1)
    if line.startswith("reveal_type")
}
REFUSED = {number for number, line in enumerate(LINES, start=1) if line.endswith("# error")}


def plain(shown: str) -> str:
    """Return a type without the modules of its names, as both checkers would write it."""
    return re.sub(r"[a-z_]+\.", "", shown).replace("builtins.", "").replace("Tuple", "tuple")


def run(command: list[str], folder: Path) -> str:
    source = Path(revnet.__file__).parents[1]
    environment = {**os.environ, "MYPYPATH": str(source), "PYTHONPATH": str(source)}
    done = subprocess.run(
        command, cwd=folder, env=environment, text=True, capture_output=True, check=False
    )
    return done.stdout


def check(found: str, revealed: str, error: str) -> None:
    """Compare what a checker wrote with the comments of the file.

    Args:
        found: What it wrote.
        revealed, error: Patterns of a line and a type, and of the line of an error.
    """
    types = {int(line): plain(shown) for line, shown in re.findall(revealed, found)}
    assert types == REVEALED, found
    assert {int(line) for line in re.findall(error, found)} == REFUSED, found


@pytest.mark.slow
def test_mypy_reads_what_users_write(tmp_path: Path) -> None:
    (tmp_path / "user.py").write_text(USER)
    # The library's own files are checked by `make types`.
    flags = ["--strict", "--follow-imports=silent", "--no-error-summary", "--cache-dir", ".cache"]
    found = run([sys.executable, "-m", "mypy", *flags, "user.py"], tmp_path)
    check(found, r'user.py:(\d+): note: Revealed type is "(.*)"', r"user.py:(\d+): error:")


BESIDE_PYTHON = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
PYRIGHT = shutil.which("basedpyright", path=BESIDE_PYTHON) or shutil.which("pyright")


@pytest.mark.skipif(PYRIGHT is None, reason="needs pyright or basedpyright on the PATH")
def test_pyright_reads_what_users_write(tmp_path: Path) -> None:
    (tmp_path / "user.py").write_text(USER)
    (tmp_path / "pyrightconfig.json").write_text(
        '{"typeCheckingMode": "standard", "reportUnusedExpression": false}'
    )
    assert PYRIGHT is not None
    found = run([PYRIGHT, "--pythonpath", sys.executable, "user.py"], tmp_path)
    check(
        found,
        r'user.py:(\d+):\d+ - information: Type of ".*" is "(.*)"',
        r"user.py:(\d+):\d+ - error",
    )


def test_the_names_of_executions_are_those_of_the_table() -> None:
    assert sorted(get_args(ExecutionName)) == sorted(EXECUTIONS)


VALUES = {
    "execution": EXECUTIONS,
    "streams": ("auto", "fixed", "float"),
    "determinism_check": ("default", "none", "exact"),
    "split": ("copy", "chunk"),
    "merge": ("mean", "sum", "concat"),
}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ReversibleSequence", tuple(VALUES)),
        ("Reversible", ("execution", "streams", "determinism_check")),
        ("convert", ("execution", "determinism_check")),
    ],
)
def test_help_names_every_value(name: str, options: tuple[str, ...]) -> None:
    shown = pydoc.render_doc(getattr(revnet, name), renderer=pydoc.plaintext)
    for option in options:
        for value in VALUES[option]:
            assert f'`"{value}"`' in shown, (option, value)
    sequential = pydoc.render_doc(revnet.SequentialSequence, renderer=pydoc.plaintext)
    assert all(f'`"{value}"`' in sequential for value in EXECUTIONS if value != "invert")


class Routed(nn.Module):
    """A branch with an extra output."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.sin(), x.mean()


def test_with_aux_has_one_form() -> None:
    x = torch.randn(2, 8)
    plain_net = revnet.ReversibleSequence([(nn.Linear(8, 8), nn.Linear(8, 8))])
    y, aux = plain_net.with_aux(x)
    assert torch.equal(y, plain_net(x))
    assert aux == {}
    for kind in (revnet.ReversibleSequence, revnet.SequentialSequence):
        net = kind([(Routed(), nn.Linear(8, 8))])
        seen = []
        net.register_forward_hook(lambda *call, seen=seen: seen.append(call))
        y, aux = net.with_aux(x)
        assert torch.equal(y, net(x)[0])
        ((name, extra),) = aux.items()
        assert name.endswith("branch f")
        assert torch.equal(extra, x.mean())
        assert len(seen) == 2
    steps = revnet.Reversible([revnet.Step(Routed(), target=0, source=1)])
    streams, aux = steps.with_aux(x, x)
    assert torch.equal(streams[0], x + x.sin())
    assert list(aux) == ["step 0"]
    linear = revnet.Reversible([revnet.Step(nn.Linear(8, 8), target=0, source=1)])
    streams, aux = linear.with_aux(x, x, x)
    assert (len(streams), aux) == (3, {})
