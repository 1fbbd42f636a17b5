"""`revnet compare` and the measurements behind it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from revnet.app.cli import main
from revnet.app.measure import executed, reconstruction_error, step_memory
from revnet.app.model import PAD, Shape, Transformer, bits_per_token

SHAPE = Shape(depth=4, width=32, heads=2, prefix_vocab=9, prefix_length=4, vocab=7, rows=6, columns=6)


def network() -> tuple[Transformer, torch.Tensor, torch.Tensor]:
    model = Transformer(SHAPE).double()
    torch.nn.init.normal_(model.head.weight)
    prefix = torch.randint(1, 9, (4, 4))
    prefix[:, 0] = PAD
    return model, prefix, torch.randint(7, (4, 36))


def test_every_execution_gives_the_same_gradients() -> None:
    model, prefix, tokens = network()
    gradients = {}
    for name in ("stored", "checkpointed", "invert"):
        with executed(model, name):
            bits_per_token(model, prefix, tokens).backward()
        gradients[name] = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        model.zero_grad()
    assert model.layers.execution == "invert"
    for name in ("checkpointed", "invert"):
        torch.testing.assert_close(gradients[name], gradients["stored"], rtol=1e-9, atol=1e-13)


def test_memory_is_measured_beside_gradients_that_stay() -> None:
    model, prefix, tokens = network()
    bits_per_token(model, prefix, tokens).backward()
    before = [p.grad for p in model.parameters()]
    peaks = {}
    for name in ("stored", "invert"):
        with executed(model, name):
            report = step_memory(model, lambda: bits_per_token(model, prefix, tokens))
        peaks[name] = report.peak_bytes
        assert report.grad_bytes == 0
    assert all(p.grad is old for p, old in zip(model.parameters(), before, strict=True))
    assert peaks["invert"] < peaks["stored"] / 2


def test_reconstruction_error_is_of_the_size_of_rounding() -> None:
    model, prefix, tokens = network()
    assert 0 < reconstruction_error(model, prefix, tokens) < 1e-14
    assert 1e-9 < reconstruction_error(model.float(), prefix, tokens) < 1e-5
    assert model.training


def test_compare_prints_draws_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "table.md"
    small = ("--depth", "4", "--width", "32", "--tokens", "16", "--batch", "2", "--repeats", "1", "--device", "cpu")
    assert main(["compare", *small, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines()[:-1])) <= 80
    text = out.read_text(encoding="utf-8")
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("|")}
    for name in ("stored", "checkpointed", "planned", "reversible"):
        assert name in printed
        error = float(rows[name].split("|")[-2])
        assert 1e-9 < error < 1e-4
    assert "![Memory and time against depth](table.png)" in text
    assert (tmp_path / "table.png").stat().st_size > 10_000


def test_compare_needs_a_known_kind_of_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "--depth", "1", "--width", "32", "--tokens", "4", "--out", "table.txt"]) == 2
    assert "give a file that ends in .md" in capsys.readouterr().err
