"""The comparison of forms is one of equals: same weights, same batches, honest intervals."""

from __future__ import annotations

import json
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import quality_lm as lm

SIZE = lm.Size(2, 16, 2, 8, 2, 6, (1e-2,))


def text() -> lm.Text:
    data = torch.arange(4000).mul(7).remainder(50).to(torch.uint8)
    return lm.Text(data[:3000], data[3000:])


def parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


FORMS = [form for form in lm.FORMS if not form.endswith("chunk")]


@pytest.mark.parametrize("form", FORMS)
def test_a_form_has_the_same_weights_as_the_ordinary_network(form: str):
    ordinary, model = lm.Model("ordinary", SIZE, 1), lm.Model(form, SIZE, 1)
    assert parameters(model) == parameters(ordinary)
    sums = [
        sorted(p.detach().double().sum().item() for p in each.parameters())
        for each in (ordinary, model)
    ]
    assert sums[0] == sums[1]


def test_the_ordinary_form_is_the_plain_network():
    model = lm.Model("ordinary", SIZE, 1)
    tokens = torch.randint(256, (2, 8))
    x = model.embedding(tokens)
    for layer in model.body.layers:
        x = x + layer.attention(x, rotary_pos_emb=model.rotary)
        x = x + layer.mlp(x)
    assert torch.allclose(model(tokens), model.head(model.norm(x)), atol=1e-5)


def test_a_block_of_two_layers_adds_whole_layers_in_turn():
    model = lm.Model("layer-copy", SIZE, 1)
    tokens = torch.randint(256, (2, 8))
    (block,) = model.body.blocks
    x = model.embedding(tokens)
    x1 = x + block.f(x, rotary_pos_emb=model.rotary)
    x2 = x + block.g(x1, rotary_pos_emb=model.rotary)
    assert torch.allclose(model(tokens), model.head(model.norm((x1 + x2) / 2)), atol=1e-5)


def test_momentum_comes_close_to_the_ordinary_network():
    tokens = torch.randint(256, (2, 8))
    expected = lm.Model("ordinary", SIZE, 1)(tokens)
    apart = [
        (lm.Model(f"momentum-{mu}", SIZE, 1)(tokens) - expected).abs().max().item()
        for mu in ("1/2", "1/16", "1/256")
    ]
    assert apart[0] > 4 * apart[1] > 16 * apart[2] > 0


def test_chunks_have_streams_of_a_whole_width_and_not_of_less_than_64():
    with pytest.raises(SystemExit, match="streams of width 16; 64 is the least"):
        lm.Model("branch-chunk", SIZE, 0)
    wide = lm.Size(2, 64, 1, 8, 2, 4, (1e-2,))
    model = lm.Model("layer-chunk", wide, 0)
    assert model(torch.zeros(1, 8, dtype=torch.int64)).shape == (1, 8, 256)
    assert model.body.blocks[0].f.attention.qkv.in_features == 64


@pytest.mark.parametrize(
    ("form", "bits"),
    [("ordinary", None), ("layer-sum", 0), ("momentum-1/8", 3), ("momentum-1/8-branch", 6)],
)
def test_kept_bits(form: str, bits: float | None):
    assert lm.kept_bits(form) == bits


# --- runs


def options(out: Path, **changes: Any) -> Any:
    given = {
        "shape": SIZE, "device": "cpu", "execution": "store", "out": out, "evaluations": 1,
        "forms": ["ordinary", "layer-copy"], "rates": [1e-2, 1e-3], "seeds": 2, "first_seed": 0,
        "minutes": 10, "hardware": "none", "picture": "curves.png", "compile": False,
        "capture": False,
    }  # fmt: skip
    return lm.argparse.Namespace(**(given | changes))


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["ordinary", "layer-copy", "cycle-3", "momentum-1/8"])
def test_captured_steps_train_as_eager_ones(tmp_path: Path, form: str):
    size = lm.Size(4, 64, 2, 32, 4, 12, (1e-2,))
    on_cuda = lm.Text(*(data.cuda() for data in (text().train, text().held_out)))
    curves = []
    for name, capture in (("eager", False), ("captured", True)):
        given = options(tmp_path / name, device="cuda", shape=size, capture=capture)
        run = lm.Run(form, 1e-2, 0)
        assert lm.train(run, on_cuda, given, time.monotonic() + 100)
        curves.append([point["bits"] for point in lm.results(given.out)[0]["curve"]])
    eager, captured = curves
    assert eager[-1] < eager[0] - 0.05
    assert captured == pytest.approx(eager, rel=1e-3)


def test_a_run_that_was_stopped_ends_as_one_that_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run, never = lm.Run("layer-copy", 1e-2, 0), time.monotonic() + 1000
    assert lm.train(run, text(), options(tmp_path / "whole"), never)
    calls = iter([False, False, True])
    clock = lambda: never + 1 if next(calls, False) else 0.0  # noqa: E731
    monkeypatch.setattr(lm.time, "monotonic", clock)
    assert not lm.train(run, text(), options(tmp_path / "parts"), never)  # after the third step
    assert torch.load(tmp_path / "parts" / run.name / "checkpoint.pt")["step"] == 3
    assert lm.train(run, text(), options(tmp_path / "parts"), never)
    whole, parts = (
        json.loads((tmp_path / name / run.name / "result.json").read_text())
        for name in ("whole", "parts")
    )
    assert whole["bits"] == parts["bits"]
    seen = {p["step"]: p["bits"] for p in whole["curve"]}
    assert all(seen[p["step"]] == p["bits"] for p in parts["curve"])


def test_a_sweep_then_seeds_at_the_best_rate_and_a_report(tmp_path: Path):
    assert lm.train_all(text(), options(tmp_path))
    found = lm.results(tmp_path)
    assert len(found) == 2 * 2 + 2
    for form in ("ordinary", "layer-copy"):
        tried = [r for r in found if r["form"] == form and r["seed"] == 0]
        (second,) = [r for r in found if r["form"] == form and r["seed"] == 1]
        assert second["rate"] == min(tried, key=lambda r: r["bits"])["rate"]
    report = (tmp_path / "report.md").read_text()
    assert "| layer-copy | 0 |" in report
    assert "## Learning rates" in report
    assert (tmp_path / "curves.png").exists()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/result.json")}
    assert lm.train_all(text(), options(tmp_path))  # nothing is left to do
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/result.json")}


def test_batches_depend_on_the_seed_alone():
    first = lm.batch(text().train, SIZE, 5, "cpu")
    torch.manual_seed(9)
    again, other = (lm.batch(text().train, SIZE, seed, "cpu") for seed in (5, 6))
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], other[0])
    assert torch.equal(first[0][:, 1:], first[1][:, :-1])


def test_sources_are_read_once_and_files_are_held_out_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for number in range(200):
        (tmp_path / f"{number}.py").write_text(f"x = {number}\n")
        (tmp_path / f"again_{number}.py").write_text(f"x = {number}\n")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    found = lm.python_sources(10**6)
    parts = [bytes(part.numpy()).split(b"\0")[:-1] for part in (found.train, found.held_out)]
    files = {path.read_bytes() for path in tmp_path.glob("*.py")}
    assert sorted(parts[0] + parts[1]) == sorted(files)
    assert 2 <= len(parts[1]) <= 25


# --- what it says


def test_a_paired_difference_and_its_interval():
    base = {0: 1.0, 1: 2.0, 2: 4.0}
    mean, half, count = lm.paired({0: 1.01, 1: 2.04, 2: 4.12, 7: 9.0}, base)
    assert (mean, count) == (pytest.approx(2.0), 3)
    assert half == pytest.approx(4.303 * 1.0 / 3**0.5)
    assert lm.paired({1: 2.04}, base) == (pytest.approx(2.0), None, 1)


@pytest.mark.parametrize(
    ("mean", "half", "said"),
    [
        (0.1, None, "one pair decides nothing"),
        (0.1, 0.4, "within 0.6 %"),
        (0.5, 0.4, "too few pairs to decide about 0.6 %"),
        (1.2, 0.4, "worse than 0.6 %"),
    ],
)
def test_a_verdict(mean: float, half: float | None, said: str):
    assert lm.verdict(mean, half, 0.6) == said


def test_a_form_with_more_parameters_is_not_judged():
    runs = [
        {"form": form, "rate": 0.1, "seed": seed, "parameters": size, "bits": 2.0 + seed,
         "curve": [{"step": 1, "seconds": 1.0, "bits": 2.0}]}
        for form, size in (("ordinary", 1000), ("layer-copy", 1010), ("layer-chunk", 1100))
        for seed in (0, 1)
    ]  # fmt: skip
    rows = {row.split(" | ")[0]: row for row in lm.table(runs, 0)}
    assert rows["| layer-copy"].endswith("| within 0.6 % |")
    assert rows["| layer-chunk"].endswith("| 10 % more parameters: not compared |")


def test_a_cycle_reads_the_sum_of_the_streams_that_it_does_not_update():
    wide = lm.Size(4, 16, 2, 8, 2, 6, (1e-2,))
    model = lm.Model("cycle-3", wide, 1)
    tokens = torch.randint(256, (2, 8))
    x = model.embedding(tokens)
    layers = lm.Model("ordinary", wide, 1).body.layers
    a, b, c = x / 2, x / 2, x / 2
    a = a + layers[0](b + c, rotary_pos_emb=model.rotary)
    b = b + layers[1](a + c, rotary_pos_emb=model.rotary)
    c = c + layers[2](a + b, rotary_pos_emb=model.rotary)
    a = a + layers[3](b + c, rotary_pos_emb=model.rotary)
    assert torch.allclose(model(tokens), model.head(model.norm((a + b + c) * 2 / 3)), atol=1e-5)


def test_a_cycle_of_branches_reads_what_its_attention_added():
    model = lm.Model("cycle-3-branch", lm.Size(2, 16, 2, 8, 2, 6, (1e-2,)), 1)
    tokens = torch.randint(256, (2, 8))
    x = model.embedding(tokens)
    first, second = lm.Model("ordinary", lm.Size(2, 16, 2, 8, 2, 6, (1e-2,)), 1).body.layers
    a, b, c = x / 2, x / 2, x / 2
    a = a + first.attention(b + c, rotary_pos_emb=model.rotary)
    b = b + first.mlp(a + c)
    c = c + second.attention(a + b, rotary_pos_emb=model.rotary)
    a = a + second.mlp(b + c)
    assert torch.allclose(model(tokens), model.head(model.norm((a + b + c) * 2 / 3)), atol=1e-5)
