"""`revnet compare`, `revnet plan`, and the measurements behind them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import revnet
from revnet.app.case import Case
from revnet.app.cli import main
from revnet.app.measure import executed, reconstruction_error, step_memory
from revnet.app.model import PAD, Shape, Transformer, bits_per_token

SHAPE = Shape(
    depth=4, width=32, heads=2, prefix_vocab=9, prefix_length=4, vocab=7, rows=6, columns=6
)


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
        gradients[name] = torch.cat(
            [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        )
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


def test_compare_prints_draws_and_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "table.md"
    small = (
        "--depth",
        "4",
        "--width",
        "32",
        "--tokens",
        "16",
        "--batch",
        "2",
        "--repeats",
        "1",
        "--device",
        "cpu",
    )
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
    assert (
        main(["compare", "--depth", "1", "--width", "32", "--tokens", "4", "--out", "table.txt"])
        == 2
    )
    assert "give a file that ends in .md" in capsys.readouterr().err


def test_a_gradient_error_is_that_of_the_precision(tmp_path: Path) -> None:
    out = tmp_path / "low.md"
    small = (
        "--depth",
        "2",
        "--width",
        "32",
        "--tokens",
        "16",
        "--batch",
        "2",
        "--repeats",
        "1",
        "--device",
        "cpu",
    )
    assert main(["compare", *small, "--dtype", "bfloat16", "--out", str(out)]) == 0
    lines = [
        line.split("|")
        for line in out.read_text(encoding="utf-8").splitlines()
        if line.startswith("|")
    ]
    errors = {cells[1].strip(): cells[-2].strip() for cells in lines[2:]}
    assert 1e-4 < float(errors["stored"]) < 0.1
    # Fixed streams: every execution computes the same bits.
    assert len({errors["stored"], errors["planned"], errors["reversible"]}) == 1


PLANNED = ("--depth", "3", "--width", "32", "--tokens", "32", "--batch", "2")


def test_plan_prints_draws_and_saves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "here.png"
    assert main(["plan", *PLANNED, "--memory", "40%", "--device", "cpu", "--out", str(out)]) == 0
    plan = revnet.Plan.load(tmp_path / "here.json")
    assert str(plan) in capsys.readouterr().out
    assert out.stat().st_size > 10_000
    case = Case(Shape(3, 32, 1, 2, 1, 256, 32, 1), 2, torch.device("cpu"), "float32", "auto")
    model = case.network()
    model.layers.execution = plan
    prefix, tokens = case.example()
    x, keywords = model.embed(prefix, tokens[:, :-1])
    x = x.detach()
    # A plan counts activations, beside the gradients of parameters.
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    report = revnet.measure_memory(lambda: model.layers(x, **keywords))
    assert report.peak_bytes <= plan.budget


def test_plan_for_a_device_that_is_not_here(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ("--meta", "--out", str(tmp_path / "there.png"))
    assert main(["plan", *PLANNED, "--device-memory", "2.5MiB", *out]) == 0
    assert "estimated from FLOPs" in capsys.readouterr().out
    case = Case(Shape(3, 32, 1, 2, 1, 256, 32, 1), 2, torch.device("meta"), "float32", "auto")
    state = 16 * sum(parameter.numel() for parameter in case.network().parameters())
    assert revnet.Plan.load(tmp_path / "there.json").budget == 5 * 2**19 - state
    for options, message in [
        ([], "say what it has with --device-memory"),
        (["--memory", "1KiB"], "no plan is within 1.00 KiB"),
        (["--memory", "much"], "'much' is not a size"),
        (["--device-memory", "1KiB"], "parameters, gradients and AdamW's averages alone take"),
        (["--device-memory", "1 stone"], "write a number and a unit, as in 80GiB"),
        (["--memory", "1MiB", "--width", "38"], "--width 38 is not a multiple of 4"),
    ]:
        assert main(["plan", *PLANNED, *options, *out]) == 2
        assert message in capsys.readouterr().err


def test_plan_of_a_run_takes_its_network(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = (
        "--dtype",
        "bfloat16",
        "--depth",
        "1",
        "--width",
        "32",
        "--batch",
        "4",
        "--steps",
        "1",
        "--device",
        "cpu",
    )
    assert main(["train", *tiny, "--out", str(tmp_path / "run")]) == 0
    assert (
        main(
            ["plan", str(tmp_path / "run"), "--memory", "50%", "--out", str(tmp_path / "plan.png")]
        )
        == 0
    )
    plan = revnet.Plan.load(tmp_path / "plan.json")
    assert (len(plan.executions), plan.shape) == (2, (4, 67, 32))
    assert "depth 1, width 32, 67 tokens, batch 4, bfloat16, " in capsys.readouterr().out
    deeper = ("--depth", "3", "--memory", "50%", "--out", str(tmp_path / "deeper.png"))
    assert main(["plan", str(tmp_path / "run"), *deeper]) == 0
    assert len(revnet.Plan.load(tmp_path / "deeper.json").executions) == 6
