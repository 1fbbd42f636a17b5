"""Autocast: the replay runs in the forward's state, wherever backward is called."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from cases import Mlp, build, noted, randn
from oracle import assert_same_gradients, gradients_of, relative_error, stored_copy
from revnet import ReversibleSequence


class Rounded(nn.Module):
    """A linear branch whose products are whole numbers if, and only if, its weights are rounded to
    16 bits.
    """

    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        whole = torch.randint(-1, 2, (width, width), generator=generator).float()
        self.linear = nn.Linear(width, width, bias=False)
        with torch.no_grad():
            self.linear.weight.copy_(whole * (1 + 2**-12))

    def forward(self, x: Tensor) -> Tensor:
        out = self.linear(x)
        noted(self).append(out.dtype)
        return out.relu()


def networks(device: str = "cpu") -> tuple[ReversibleSequence, nn.Module]:
    pairs = [(Rounded(4, 2 * i).to(device), Rounded(4, 2 * i + 1).to(device)) for i in range(2)]
    return ReversibleSequence(pairs, merge="concat"), stored_copy(pairs, merge="concat")


def whole(device: str = "cpu") -> Tensor:
    return torch.arange(-6.0, 6.0, device=device).view(3, 4).requires_grad_()


@pytest.mark.parametrize("inside", [True, False], ids=["backward-inside", "backward-outside"])
def test_the_replay_runs_in_the_forwards_autocast(inside: bool):
    net, oracle = networks()
    found = []
    for module in (net, oracle):
        x = whole()
        with torch.autocast("cpu", torch.bfloat16):
            out = module(x)
            assert out.dtype is torch.float32
            if inside:
                out.sum().backward()
        if not inside:
            out.sum().backward()
        found.append({"out": out.detach(), "x": x.grad, **gradients_of(module)})
    for name, value in found[1].items():
        assert torch.equal(found[0][name], value), name
    assert all(
        noted(branch) == [torch.bfloat16] * 2
        for block in net.blocks
        for branch in (block.f, block.g)
    )


def test_a_forward_without_autocast_is_replayed_without_it():
    net, oracle = networks()
    found = []
    for module in (net, oracle):
        x = whole()
        out = module(x)
        with torch.autocast("cpu", torch.bfloat16):
            out.sum().backward()
        found.append({"x": x.grad, **gradients_of(module)})
    assert_same_gradients(*found, tolerance=1e-6)
    assert all(
        noted(branch) == [torch.float32] * 2
        for block in net.blocks
        for branch in (block.f, block.g)
    )


def test_autocast_switched_on_and_off_inside_a_branch():
    class Partly(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                inner = self.enter(x)
            with torch.autocast("cpu", enabled=False):
                return self.leave(inner.float())

    pairs = build([(Partly, Partly)] * 2, 8, dtype=torch.float32)
    net, oracle = ReversibleSequence(pairs), stored_copy(pairs)
    found = []
    for module in (net, oracle):
        x = randn(2, 6, 8, dtype=torch.float32, requires_grad=True)
        module(x).square().sum().backward()
        found.append({"x": x.grad, **gradients_of(module)})
    # A bit of bfloat16 may flip where the rebuilt stream differs in its last bit.
    assert_same_gradients(*found, tolerance=2e-2)


def test_a_whole_network_is_near_the_stored_loop():
    pairs = build([(Mlp, Mlp)] * 6, 8, dtype=torch.float32)
    net, oracle = ReversibleSequence(pairs), stored_copy(pairs)
    found = []
    for module in (net, oracle):
        x = randn(2, 6, 8, dtype=torch.float32, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            loss = module(x).square().sum()
        loss.backward()
        found.append({"x": x.grad, **gradients_of(module)})
    assert_same_gradients(*found, tolerance=2e-2)


def test_the_weights_cast_by_autocast_are_not_kept_by_the_sequence():
    """Autocast caches the cast weights; the replay casts anew, and gradients arrive in the weights'
    own dtype.
    """
    net, _ = networks()
    with torch.autocast("cpu", torch.bfloat16):
        first = net(whole()).sum()
        second = net(whole()).sum()
    (first + second).backward()
    once, _ = networks()
    with torch.autocast("cpu", torch.bfloat16):
        loss = once(whole()).sum()
    loss.backward()
    for (name, p), q in zip(net.named_parameters(), once.parameters(), strict=True):
        assert p.grad.dtype is torch.float32
        assert torch.equal(p.grad, 2 * q.grad), name


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_the_replay_runs_in_the_forwards_autocast_on_cuda(dtype: torch.dtype):
    net, oracle = networks("cuda")
    found = []
    for module in (net, oracle):
        x = whole("cuda")
        with torch.autocast("cuda", dtype):
            out = module(x)
        out.sum().backward()
        found.append({"out": out.detach(), "x": x.grad, **gradients_of(module)})
    for name, value in found[1].items():
        assert torch.equal(found[0][name], value), name
    assert all(
        noted(branch) == [dtype] * 2 for block in net.blocks for branch in (block.f, block.g)
    )


@pytest.mark.gpu
def test_scaled_float16_training_on_cuda():
    pairs = [(f.cuda(), g.cuda()) for f, g in build([(Mlp, Mlp)] * 6, 64, dtype=torch.float32)]
    net, oracle = ReversibleSequence(pairs), stored_copy(pairs)
    losses = []
    for module in (net, oracle):
        optimizer, scaler = (
            torch.optim.SGD(module.parameters(), lr=1e-3),
            torch.amp.GradScaler("cuda"),
        )
        for seed in range(5):
            x = randn(4, 16, 64, dtype=torch.float32, seed=seed).cuda()
            with torch.autocast("cuda", torch.float16):
                loss = module(x).square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        losses.append(loss.detach())
    assert relative_error(*losses) < 1e-2
