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

import revnet
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
    "long_context": (0.2, 0.0),
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


@pytest.mark.parametrize(("heads", "kv_heads", "groups"), [(4, 4, 2), (8, 4, 4), (6, 2, 2)])
def test_groups_of_heads_are_the_attention(
    heads: int, kv_heads: int, groups: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.delitem(sys.modules, "common", raising=False)
    example = importlib.import_module("long_context")
    size, width, tokens = 4, 24, 7
    torch.manual_seed(0)
    whole = example.HeadGroup(width, heads, kv_heads, size).double()
    parts = [
        example.HeadGroup(width, heads // groups, kv_heads // groups, size).double()
        for _ in range(groups)
    ]
    names = ("q", "k", "v")
    given = dict(zip(names, whole.qkv.weight.split(whole.sizes), strict=True))
    with torch.no_grad():
        for i, part in enumerate(parts):
            rows = [given[name].chunk(groups)[i] for name in names]
            part.qkv.weight.copy_(torch.cat(rows))
            part.leave.weight.copy_(whole.leave.weight.chunk(groups, 1)[i])
    turn = {"turn": example.turns(tokens, size, torch.empty(0, dtype=torch.float64))}
    net = revnet.Reversible([revnet.Step(part, 0, 1, constants=turn) for part in parts])
    one = revnet.Reversible([revnet.Step(whole, 0, 1, constants=turn)])
    x, z = torch.randn(2, 2, tokens, width, dtype=torch.float64).requires_grad_()
    found = []
    for program in (net, one):
        y, _ = program(x, z)
        inputs = torch.autograd.grad(y.sin().sum(), (x, z, *program.parameters()))
        found.append([y, *inputs])
    assert torch.allclose(found[0][0], found[1][0], rtol=0, atol=1e-12)
    assert torch.allclose(found[0][2], found[1][2], rtol=0, atol=1e-12)
    # Of the weights, the last of all: each group has its columns of the output's.
    leave = torch.cat([found[0][3 + 3 * i + 2] for i in range(groups)], 1)
    assert torch.allclose(leave, found[1][-1], rtol=0, atol=1e-12)


@pytest.fixture
def long_context(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.delitem(sys.modules, "common", raising=False)
    return importlib.import_module("long_context")


def whole_loss(model: Any, hidden: Tensor, targets: Tensor) -> Tensor:
    logits = model.head(model.norm(hidden)).flatten(0, 1)
    return F.cross_entropy(logits, targets.flatten())


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("chunk", [1, 7, 40])
@pytest.mark.parametrize("device", DEVICES)
def test_a_loss_in_chunks_is_the_loss(long_context: Any, device: str, chunk: int):
    model = long_context.LongContext(11, 8, 1, 2, 2, 1, 8, 8, chunk).to(device, torch.float64)
    hidden = torch.randn(2, 20, 8, device=device, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(11, (2, 20), device=device)
    wanted = (hidden, model.head.weight, model.norm.weight)
    found, expected = (
        [loss, *torch.autograd.grad(loss, wanted)]
        for loss in (model.loss(hidden, targets), whole_loss(model, hidden, targets))
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("device", DEVICES)
def test_a_loss_in_chunks_is_as_near_in_bfloat16(
    long_context: Any, device: str, monkeypatch: pytest.MonkeyPatch
):
    """As near to float64 as plain cross entropy, which has all logits in float32 at once.

    But for one thing: the gradient of the weights is rounded to bfloat16 twice, in each chunk and
    after their sum, so that its error may be √2 times as large.
    """
    # Not the fused one, where it is installed.
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    model = long_context.LongContext(500, 64, 1, 2, 2, 1, 64, 64, 16).to(device, torch.bfloat16)
    hidden = torch.randn(2, 512, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(500, (2, 512), device=device)
    twin, exact = copy.deepcopy(model).double(), hidden.detach().double().requires_grad_()

    def plain(model: Any, hidden: Tensor) -> Tensor:
        logits = model.head(model.norm(hidden)).flatten(0, 1)
        high = torch.promote_types(logits.dtype, torch.float32)
        return F.cross_entropy(logits.to(high), targets.flatten())

    def results(loss: Tensor, model: Any, hidden: Tensor) -> list[Tensor]:
        wanted = (hidden, model.head.weight, model.norm.weight)
        return [x.double() for x in (loss.detach(), *torch.autograd.grad(loss, wanted))]

    true = results(plain(twin, exact), twin, exact)
    whole = results(plain(model, hidden), model, hidden)
    chunks = results(model.loss(hidden, targets), model, hidden)
    for a, b, c in zip(true, whole, chunks, strict=True):
        assert (c - a).norm() <= 2**0.5 * (b - a).norm() + 1e-6 * a.norm()


def test_a_loss_in_chunks_does_not_grow_with_the_vocabulary(long_context: Any):
    def grows(vocabulary: int) -> float:
        """Return by how many bytes one more token raises the peak of the loss."""
        peaks = []
        for tokens in (256, 1024):
            model = long_context.LongContext(vocabulary, 8, 1, 2, 2, 1, 8, 8, 64).bfloat16()
            hidden = torch.randn(1, tokens, 8, dtype=torch.bfloat16, requires_grad=True)
            targets = torch.randint(vocabulary, (1, tokens))
            peaks.append(measure_memory(model.loss, hidden, targets).peak_bytes)
        return (peaks[1] - peaks[0]) / 768

    assert grows(2048) <= grows(64) + 16  # logits of a token alone take 4096 bytes


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")  # what liger-kernel warns about is its own
def test_the_fused_loss_is_the_loss(long_context: Any):
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")
    model = long_context.LongContext(1000, 64, 1, 2, 2, 1, 64, 64, 64).cuda().bfloat16()
    hidden = torch.randn(2, 300, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(1000, (2, 300), device="cuda")
    wanted = (hidden, model.head.weight, model.norm.weight)
    twin = copy.deepcopy(model).double()
    exact = hidden.detach().double().requires_grad_()
    losses = model.loss(hidden, targets), whole_loss(twin, exact, targets)
    assert "Liger" in type(losses[0].grad_fn).__name__
    found = torch.autograd.grad(losses[0], wanted)
    expected = torch.autograd.grad(losses[1], (exact, twin.head.weight, twin.norm.weight))
    for a, b in zip(found, expected, strict=True):
        assert (a.double() - b).norm() <= 0.02 * b.norm()


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_is_short(path: Path):
    assert len(path.read_text().splitlines()) < 150
