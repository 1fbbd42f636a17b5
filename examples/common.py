"""What the examples share: options, digits, and a comparison of stored with inverted execution."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

import revnet


def options(
    description: str | None, argv: Sequence[str] | None, **extra: object
) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--full",
        action="store_true",
        help="the size of the paper; otherwise a toy that takes seconds",
    )
    for name, default in extra.items():
        kind = str if default is None else type(default)
        parser.add_argument(f"--{name}", type=kind, default=default)
    torch.manual_seed(0)
    args = parser.parse_args(argv)
    if args.device != "cpu":
        # Otherwise kernels that add in changing order differ from run to run, and not by what is
        # compared here.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False
    return args


def digits(device: str, size: int = 8, channels: int = 1) -> tuple[Tensor, Tensor]:
    """1,797 digits, resized: images (n, channels, size, size) from 0 to 1, and classes (n,)."""
    from sklearn.datasets import load_digits

    images, classes = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32, device=device).view(-1, 1, 8, 8) / 16
    if size != 8:
        x = nn.functional.interpolate(x, size=(size, size), mode="bilinear")
    return x.expand(-1, channels, -1, -1).contiguous(), torch.tensor(classes, device=device)


class Cost(NamedTuple):
    """Of one training step: memory kept for backward and peak (MiB above the start), time (ms)."""

    saved: float
    peak: float
    time: float
    gradients: list[Tensor]
    buffers: list[Tensor]


def cost(model: nn.Module, loss: Callable[[], Tensor], execution: str) -> Cost:
    for module in model.modules():
        if isinstance(module, revnet.Reversible | revnet.ReversibleSequence):
            module.execution = execution
    before = [buffer.clone() for buffer in model.buffers()]

    def step() -> float:
        model.zero_grad()
        started = time.perf_counter()
        torch.manual_seed(0)
        loss().backward()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return 1000 * (time.perf_counter() - started)

    step()
    buffers = [buffer.clone() for buffer in model.buffers()]
    fastest = min(step() for _ in range(2))
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    report = revnet.measure_memory(loss)
    model.zero_grad()
    for buffer, value in zip(model.buffers(), before, strict=True):
        buffer.copy_(value)
    mib = report.saved_bytes / 2**20, report.peak_bytes / 2**20
    return Cost(*mib, fastest, gradients, buffers)


def difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest relative difference of a tensor."""
    pairs = [(a.double(), b.double()) for a, b in zip(found, expected, strict=True)]
    return max([((a - b).norm() / b.norm().clamp_min(1e-30)).item() for a, b in pairs], default=0.0)


def compare(
    model: nn.Module,
    loss: Callable[[], Tensor],
    others: Mapping[str, Callable[[], Tensor]] | None = None,
) -> dict[str, float]:
    """Print memory, time and gradients of one training step, stored and inverted.

    Args:
        model: the network.
        loss: its loss.
        others: losses of the same network that other means than revnet save memory for.

    Returns:
        The shares of memory that inverted execution keeps and needs, the largest relative
        difference of a gradient and of a buffer, and of both executions what they keep for
        backward, their peak, in bytes, and their time, in milliseconds.
    """
    costs = {name: cost(model, loss, name) for name in ("store", "invert")}
    costs |= {name: cost(model, other, "store") for name, other in (others or {}).items()}
    print(f"{'execution':<24}{'saved':>12}{'peak':>12}{'time':>12}")
    for name, one in costs.items():
        print(f"{name:<24}{one.saved:>8.2f} MiB{one.peak:>8.2f} MiB{one.time:>9.1f} ms")
    both = {"stored": (stored := costs["store"]), "inverted": (inverted := costs["invert"])}
    error = difference(inverted.gradients, stored.gradients)
    kept, peak = inverted.saved / stored.saved, inverted.peak / stored.peak
    print(f"inverted execution keeps {kept:.1%} of stored, its peak is {peak:.1%}")
    print(f"largest relative difference of a gradient: {error:.1e}")
    return {
        "statistics": difference(inverted.buffers, stored.buffers),
        "saved": kept,
        "peak": peak,
        "error": error,
        **{f"{name}_bytes": one.saved * 2**20 for name, one in both.items()},
        **{f"{name}_peak_bytes": one.peak * 2**20 for name, one in both.items()},
        **{f"{name}_ms": one.time for name, one in both.items()},
    }


def fit(
    model: nn.Module, loss: Callable[[], Tensor], steps: int, rate: float
) -> tuple[float, float]:
    """Train with Adam; the first loss and the mean of the last five."""
    optimizer = torch.optim.Adam(model.parameters(), rate)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    last = sum(losses[-5:]) / len(losses[-5:])
    print(f"loss after {steps} steps: {losses[0]:.4f} -> {last:.4f}")
    return losses[0], last
