"""What memory buys is compared at equal memory, time and held-out bytes."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import equal_memory as memory
import quality_lm as lm

SIZE = lm.Size(4, 16, 2, 64, 2, 3, (1e-2,))


def text() -> lm.Text:
    data = torch.arange(4000).mul(7).remainder(50).to(torch.uint8)
    return lm.Text(data[:3000], data[3000:])


@pytest.mark.parametrize(("count", "context"), [(12, 4), (13, 4), (3, 4), (5, 1)])
def test_windows_have_every_byte_but_the_first_as_target_once(count: int, context: int):
    data = torch.arange(count)
    targets: list[int] = []
    for inputs, following in memory.windows(data, context):
        assert inputs.shape[1] <= context
        assert torch.equal(inputs + 1, following)
        targets += following.flatten().tolist()
    assert targets == list(range(1, count))


def test_held_out_bits_do_not_depend_on_the_batch():
    model = lm.Model("ordinary", SIZE, 1)
    found = [
        memory.held_out(model, text(), memory.replace(SIZE, batch=size), "cpu", 300)
        for size in (1, 3)
    ]
    data = text().held_out[:301].long()
    scores = [model(data[i : min(i + 64, 300)][None])[0] for i in range(0, 300, 64)]
    expected = torch.nn.functional.cross_entropy(torch.cat(scores), data[1:])
    assert found[0] == pytest.approx(found[1])
    assert found[0] == pytest.approx(expected.item() / torch.log(torch.tensor(2.0)).item())


def test_the_checkpointed_network_is_the_ordinary_one():
    tokens = torch.randint(256, (2, 64))
    stored, checkpointed = (lm.Model("ordinary", SIZE, 1, e) for e in ("store", "checkpoint"))
    for model in (stored, checkpointed):
        lm.bits_of(model, tokens, tokens).backward()
    pairs = zip(stored.parameters(), checkpointed.parameters(), strict=True)
    assert all(torch.equal(a.grad, b.grad) for a, b in pairs)
    less = memory.Arm("ordinary", 4)
    more = memory.Arm("branch-copy", 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory.Arm, "execution", "store")
        whole = [memory.activations(arm, SIZE, 512, "cpu") for arm in (less, more)]
    assert memory.activations(less, SIZE, 512, "cpu") < 0.6 * whole[0]
    assert memory.activations(more, SIZE, 512, "cpu") < 0.5 * whole[1]


@pytest.mark.parametrize("form", ["ordinary", "branch-copy", "layer-copy", "momentum-1/8"])
def test_the_context_is_the_longest_one_that_fits(form: str):
    arm, budget = memory.Arm(form, 4), 2**18
    memory.fit(arm, SIZE, budget, "cpu")
    # Gradients on their way are no activations.
    assert memory.activations(arm, SIZE, arm.context, "cpu") <= 1.05 * budget
    assert memory.activations(arm, SIZE, arm.context + 2 * memory.GRID, "cpu") > budget


def test_only_the_ordinary_network_needs_more_for_more_layers():
    for form, grows in (("ordinary", True), ("branch-copy", False)):
        shallow, deep = memory.Arm(form, 4), memory.Arm(form, 12)
        for arm in (shallow, deep):
            size = memory.replace(SIZE, layers=arm.layers)
            memory.fit(arm, size, 2**18, "cpu")
        assert (deep.bytes > 1.1 * shallow.bytes) == grows


def test_it_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lm, "python_sources", lambda most: text())
    monkeypatch.setitem(lm.SIZES, "tiny", SIZE)
    monkeypatch.setattr(memory, "timed", lambda run, device: next(clock))
    clock = itertools.cycle([0.5])
    given = "--device cpu --size tiny --threads 1 --seconds 1.9 --held-out 200 --budget 0.25"
    arms = ["--arms", "ordinary:2", "branch-copy:4@24", "--out", str(tmp_path)]
    memory.main([*given.split(), *arms, "--minutes", "0"])
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert [arm["steps"] for arm in plan] == [3, 3]
    assert plan[1]["context"] == 24
    assert (tmp_path / "report.md").read_text().count("not trained") == 2
    memory.main([*given.split(), *arms])
    report = (tmp_path / "report.md").read_text()
    assert "not trained" not in report
    assert json.loads((tmp_path / "plan.json").read_text()) == plan
    row = next(line for line in report.splitlines() if line.startswith("| branch-copy | 4 | 24 "))
    (result,) = lm.results(tmp_path / "branch-copy_4x24")
    assert f"| {result['bits']:.4f} |" in row
    with pytest.raises(SystemExit, match=r"plan.json has other arms: choose another --out"):
        memory.main([*given.split(), "--arms", "ordinary:2", "--out", str(tmp_path)])
