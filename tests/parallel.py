"""Many checks in one start of the ranks: starting processes costs more than the checks."""

from __future__ import annotations

import importlib
import json
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from cases import Attention, Mlp
from distributed import run_ranks
from oracle import StoredSequence, assert_near, stored_copy
from revnet import Fixed, Momentum, Reversible, ReversibleSequence, Step
from revnet._execution import EXECUTIONS

Check = Callable[[int, int], None]

WIDTH, TOKENS = 8, 4

# 37 fraction bits: the rounding of the streams stays below the tolerance in float64.
STREAMS = {"float": "float", "fixed": Fixed(fraction_bits=37)}


def run_checks(
    module: str, world_size: int, folder: Path, checks_name: str = "CHECKS", timeout: float = 280.0
) -> dict[str, str]:
    """Runs every function of the module's CHECKS, or of another such dict, on the ranks, in order.

    Returns:
        Per name "passed", or why not. After the first failure the ranks end, and the rest was not
        run.
    """
    checks = getattr(importlib.import_module(module), checks_name)
    outcomes = dict.fromkeys(checks, "not run: an earlier check failed")
    path = folder / "passed.json"
    failure = ""
    try:
        run_ranks(_rank, world_size, module, checks_name, str(path), timeout=timeout)
    except Exception as error:
        # The first rank to end is often not the one that failed: show what each said.
        failure = "\n".join(
            [str(error), *(file.read_text() for file in sorted(folder.glob("error-*")))]
        )
    passed = json.loads(path.read_text()) if path.exists() else []
    outcomes |= dict.fromkeys(passed, "passed")
    if failure:
        broken = next((name for name in checks if name not in passed), None)
        assert broken is not None, failure
        outcomes[broken] = failure
    return outcomes


def _rank(rank: int, world_size: int, module: str, checks_name: str, path: str) -> None:
    # A branch that ends in F.linear returns a view; the combine works out of place, so no hook is
    # lost.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    passed: list[str] = []
    for name, check in getattr(importlib.import_module(module), checks_name).items():
        torch.manual_seed(0)
        try:
            check(rank, world_size)
        except BaseException as error:
            text = f"check {name!r} on rank {rank}:\n{''.join(traceback.format_exception(error))}"
            Path(path).with_name(f"error-{rank}").write_text(text)
            raise
        dist.barrier()
        passed.append(name)
        if rank == 0:
            Path(path).write_text(json.dumps(passed))


def branches(
    depth: int = 3, dropout: float = 0.0, shared: bool = False
) -> list[tuple[nn.Module, nn.Module]]:
    """Attention and MLP pairs in float64, alike on every rank; with `shared`, the last block is the
    first one.
    """
    torch.manual_seed(7)
    pairs: list[tuple[nn.Module, nn.Module]] = [
        (Attention(WIDTH, dropout).double(), Mlp(WIDTH, dropout).double()) for _ in range(depth)
    ]
    return [*pairs[:-1], pairs[0]] if shared else pairs


def batch(world_size: int) -> tuple[Tensor, Tensor]:
    """The inputs and targets of all ranks: two examples each."""
    generator = torch.Generator().manual_seed(11)
    shape = (2 * world_size, TOKENS, WIDTH)
    return tuple(torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(2))  # type: ignore[return-value]


def loss_of(out: Tensor, target: Tensor) -> Tensor:
    return (out - target).square().mean() + (out * target).sin().mean()


def mine(rank: int, tensor: Tensor) -> Tensor:
    return tensor[2 * rank : 2 * rank + 2]


def reference(
    pairs: list[tuple[nn.Module, nn.Module]], world_size: int, steps: int = 1, **given: Any
) -> tuple[StoredSequence, dict[str, Tensor | None]]:
    """Gradients of the mean loss of all ranks, computed by the stored loop in one process.

    Rank r draws its dropout masks from seed 100 + r; step s uses the batch times (1 + s).
    """
    model = stored_copy(pairs)
    x, target = batch(world_size)
    for step in range(steps):
        for rank in range(world_size):
            torch.manual_seed(100 + rank + 1000 * step)
            out = model(mine(rank, x) * (1 + step), **given)
            (loss_of(out, mine(rank, target)) / world_size).backward()
    return model, {name: p.grad for name, p in model.named_parameters()}


def rank_loss(model: nn.Module, rank: int, world_size: int, step: int = 0, **given: Any) -> Tensor:
    """The loss of this rank's part of the batch."""
    x, target = batch(world_size)
    torch.manual_seed(100 + rank + 1000 * step)
    return loss_of(model(mine(rank, x) * (1 + step), **given), mine(rank, target))


def full(tensor: Tensor | None) -> Tensor | None:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    """The whole gradients by name, without the prefix of a wrapper."""
    return {name.removeprefix("module."): full(p.grad) for name, p in model.named_parameters()}


def assert_gradients(
    model: nn.Module, expected: Mapping[str, Tensor | None], tolerance: float = 1e-10
) -> None:
    actual = gradients(model)
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_near(actual[name], gradient, name, tolerance)


def assert_bits(actual: Mapping[str, Tensor | None], expected: Mapping[str, Tensor | None]) -> None:
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient is not None, name
        other = actual[name]
        assert other is not None, name
        assert torch.equal(other, gradient), (
            f"{name}: off by {(other - gradient).abs().max().item():.2e}"
        )


def sequence(
    depth: int = 3, dropout: float = 0.0, shared: bool = False, **options: Any
) -> ReversibleSequence:
    return ReversibleSequence(branches(depth, dropout, shared), **{"streams": "float", **options})


def every_execution(wrap: Callable[[nn.Module], nn.Module], rank: int, world_size: int) -> None:
    """All executions and stream kinds agree with one process; in fixed streams, bit for bit with
    each other.
    """
    _, expected = reference(branches(dropout=0.2), world_size)
    mixed = [EXECUTIONS[i % len(EXECUTIONS)] for i in range(6)]
    for name, streams in STREAMS.items():
        results = {}
        for execution in (*EXECUTIONS, mixed):
            model = wrap(sequence(dropout=0.2, streams=streams, execution=execution))
            rank_loss(model, rank, world_size).backward()
            assert_gradients(model, expected)
            results[str(execution)] = gradients(model)
        if name == "fixed":
            for result in results.values():
                assert_bits(result, results["store"])


def every_program(wrap: Callable[[nn.Module], nn.Module], rank: int, world_size: int) -> None:
    """Programs of steps on three streams, each step used twice: as `every_execution`; with
    momentum, bits alone.
    """

    def run(model: Callable[..., Sequence[Tensor]], rank: int) -> Tensor:
        x, target = (mine(rank, tensor) for tensor in batch(world_size))
        torch.manual_seed(100 + rank)
        return sum(loss_of(y, target) for y in model(x, x.cos(), target))

    def fresh() -> list[nn.Module]:
        torch.manual_seed(7)
        return [Mlp(WIDTH, 0.2).double() for _ in range(3)]

    def stored(*streams: Tensor) -> Sequence[Tensor]:
        held = list(streams)
        for i in range(6):
            held[i % 3] = held[i % 3] + plain[i % 3](held[(i + 1) % 3])
        return held

    plain = fresh()
    for other in range(world_size):
        (run(stored, other) / world_size).backward()
    expected = [parameter.grad for fn in plain for parameter in fn.parameters()]
    for coupling, kinds in ((None, STREAMS), (Momentum(0.9), {"fixed": "fixed"})):
        for kind, streams in kinds.items():
            results = {}
            for execution in EXECUTIONS:
                steps = [Step(fn, i, (i + 1) % 3, coupling) for i, fn in enumerate(fresh())]
                model = wrap(Reversible(steps * 2, streams=streams, execution=execution))
                run(model, rank).backward()
                results[execution] = gradients(model)
                if coupling is None:
                    for (name, found), gradient in zip(
                        results[execution].items(), expected, strict=True
                    ):
                        assert_near(found, gradient, f"{kind} {execution} {name}", 1e-10)
            if kind == "fixed":
                for result in results.values():
                    assert_bits(result, results["store"])


class Collectives(TorchDispatchMode):
    """Counts the collectives that were started, by ATen name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            name = func._schema.name.split("::")[1]
            self.counts[name] = self.counts.get(name, 0) + 1
        return func(*args, **(kwargs or {}))
