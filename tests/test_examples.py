"""Every example runs at its toy size, learns, keeps less for backward than stored execution, and
has its gradients.
"""

from __future__ import annotations

import copy
import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revnet import Reversible, measure_memory

EXAMPLES = Path(__file__).parent.parent / "examples"
# Per example: the largest share of stored memory that inverted execution keeps, and the largest
# error of a gradient: zero with fixed streams.
EXPECTED = {
    "dit": (0.1, 0.0),
    "equilibrium": (0.2, 0.0),
    "finetune": (0.1, 0.0),
    "glow": (0.1, 0.0),
    "irevnet_stage": (0.3, 0.0),
    "moe": (0.2, 1e-4),
    "momentum_net": (0.5, 0.0),
    "rev_gnn": (0.4, 1e-4),
    "rev_vit": (0.2, 0.0),
    "revnet_cnn": (0.5, 1e-3),
    "unet3d": (0.3, 0.0),
}


def test_every_example_is_tested():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*EXPECTED, "common"}


@pytest.mark.parametrize("name", EXPECTED)
def test_an_example(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    # Uninitialised memory filled with NaN is for the tests of the library; here it costs time
    # alone.
    torch.use_deterministic_algorithms(False)
    monkeypatch.delitem(sys.modules, "common", raising=False)
    example = importlib.import_module(name)
    plot = tmp_path / "flow.png"
    result = example.main(["--plot", str(plot)] if name == "glow" else [])
    assert plot.exists() == (name == "glow")
    share, error = EXPECTED[name]
    assert result["saved"] <= share
    assert result["error"] <= error
    # Running statistics move once, as in stored execution.
    assert result.get("statistics", 0) <= error
    if "first" in result:
        assert result["last"] < 0.9 * result["first"]
    assert result.get("inverse", 0) < 1e-5
    assert result.get("loop", 0) < 1e-5


@pytest.fixture
def unet(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    module = importlib.import_module("unet3d")
    model = module.UNet3d((4, 8, 8), depth=2)
    return model, torch.randn(2, 1, 8, 8, 8)


def test_the_unet_equals_a_plain_loop_in_float64(unet: Any):
    model, x = unet
    model, x = model.double(), x.double()
    twin = copy.deepcopy(model)

    def plain(x: Tensor) -> Tensor:
        streams = twin.streams(x)
        for level in twin.levels:
            for step in level.steps:
                (source,) = step.source
                streams[step.target] = streams[step.target] + step.fn(streams[source])
        return twin.head(torch.cat(streams[:2], 1))

    found, expected = model(x), plain(x)
    torch.testing.assert_close(found, expected)
    found.square().mean().backward()
    expected.square().mean().backward()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-7, atol=1e-12, msg=name)
    for (name, p), q in zip(model.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(p, q, msg=name)


def test_the_unet_keeps_the_order_of_its_memory(unet: Any):
    model, x = unet
    seen = []
    for level in model.levels:
        level.register_forward_hook(lambda module, args, out: seen.extend(out))
    y = model(x)
    channels_last = [s.is_contiguous(memory_format=torch.channels_last_3d) for s in seen]
    assert all(channels_last)
    assert len(seen) == 6 * len(model.levels)
    assert y.shape == x.shape


def test_the_unet_keeps_nothing_between_levels(unet: Any):
    model, x = unet
    # Within 5 % of the same steps as one program.
    one = copy.deepcopy(model)
    one.levels = nn.ModuleList([Reversible([s for level in one.levels for s in level.steps])])
    many, whole = (measure_memory(net, x).saved_bytes for net in (model, one))
    assert many <= 1.05 * whole


def test_the_classes_of_the_diffusion_transformer_have_gradients(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    dit = importlib.import_module("dit")
    model = dit.DiT(1, 8, 2, width=16, depth=3, heads=2)
    images, times, classes = torch.randn(3, 1, 8, 8), torch.rand(3), torch.tensor([1, 4, 10])
    # adaLN-zero: at first every block is the identity.
    x = model.enter(F.unfold(images, 2, stride=2).mT) + model.position
    torch.testing.assert_close(
        model(images, times, classes), F.fold(model.leave(x).mT, 8, 2, stride=2)
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    gradients = []
    for execution in ("invert", "store"):
        model.blocks.execution = execution
        loss = model(images, times, classes).square().mean()
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    assert all(map(torch.equal, *gradients))
    rows = gradients[0][list(dict(model.named_parameters())).index("classes.weight")]
    assert rows.abs().sum(1).nonzero().flatten().tolist() == [1, 4, 10]


def test_the_mixture_of_experts_equals_a_plain_loop(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    moe = importlib.import_module("moe")
    model = moe.LanguageModel(12, width=16, depth=3, heads=2, experts=4).double()
    text = torch.randint(256, (2, 12))

    def plain() -> tuple[Tensor, Tensor]:
        x1 = x2 = model.embed(text) + model.position
        balances = []
        for block in model.blocks:
            x1 = x1 + block.f(x2)
            update, extra = block.g(x1)
            x2 = x2 + update
            balances.append(extra["balance"])
        return model.head((x1 + x2) / 2), torch.stack(balances).mean()

    gradients = []
    for run in (lambda: model(text), plain):
        scores, balance = run()
        assert balance >= 1 - 1e-6
        loss = scores.square().mean() + balance
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-12)
    # Without the balance, the routers still have gradients, by their weights.
    router = model.blocks[0].g.router.scores.weight
    (grad,) = torch.autograd.grad(model(text)[0].square().mean(), router)
    assert grad.abs().sum() > 0


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_is_short(path: Path):
    assert len(path.read_text().splitlines()) < 150
