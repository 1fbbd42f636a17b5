"""Tensor parallel branches, context parallel attention and pipeline stages give the gradients of
one process.
"""

from __future__ import annotations

import contextlib
import operator
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.experimental import _attention as torch_ring
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.testing._internal.distributed.fake_pg import FakeStore

from cases import Mlp
from oracle import assert_near, stored_copy
from parallel import TOKENS, WIDTH, assert_bits, batch, full, loss_of, run_checks
from revnet import Fixed, ReversibleError, ReversibleSequence, measure_memory
from revnet._execution import EXECUTIONS

# Many checks share one start of the ranks.
pytestmark = pytest.mark.timeout(300)

FINE = Fixed(fraction_bits=37)


class Heads(nn.Module):
    """Attention over heads that may live on several ranks: it counts those it has."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        # Without a bias on the keys: its gradient is zero.
        self.q, self.k, self.v = (
            nn.Linear(WIDTH, WIDTH),
            nn.Linear(WIDTH, WIDTH, bias=False),
            nn.Linear(WIDTH, WIDTH),
        )
        self.leave = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        q, k, v = (
            linear(x).unflatten(-1, (-1, 2)).transpose(1, 2) for linear in (self.q, self.k, self.v)
        )
        return self.leave(self.attend(q, k, v).transpose(1, 2).flatten(2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT).softmax(-1) @ v


class Causal(Heads):
    """Causal attention over the tokens of one rank or, inside `context_parallel`, of all ranks."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def ring_on_cpu(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[DTensor, ...]:
    """torch's ring around the CPU's kernel: what `context_parallel` does with the kernels of
    CUDA.
    """
    mesh = args[0].device_mesh
    local = [arg.to_local() if isinstance(arg, DTensor) else arg for arg in args]
    if op is KERNEL.default:
        out = torch_ring._templated_ring_attention(
            mesh.get_group(), 2, op, *local[:3], is_causal=local[4]
        )[:2]
    else:
        grad, q, k, v, result, lse, dropout, causal = local
        out = sys.modules[
            torch_ring._templated_ring_attention.__module__
        ]._templated_ring_attention_backward(
            mesh.get_group(),
            2,
            op,
            grad,
            "grad_out",
            q,
            k,
            v,
            result,
            lse,
            is_causal=causal,
            dropout_p=dropout,
        )[:3]
    return tuple(DTensor.from_local(tensor, mesh, [Shard(2)], run_check=False) for tensor in out)


KERNEL = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
RING = dict.fromkeys(
    (KERNEL.default, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default),
    ring_on_cpu,
)


def pairs(depth: int = 3) -> list[tuple[nn.Module, nn.Module]]:
    torch.manual_seed(7)
    return [(Heads().double(), Mlp(WIDTH).double()) for _ in range(depth)]


def split_over(mesh: DeviceMesh, model: ReversibleSequence, streams: str) -> None:
    """Splits heads and hidden features over the mesh. The streams are whole, or sharded by tokens:
    as local tensors or as DTensors."""
    sharded = streams != "whole"
    between = Shard(1) if sharded else Replicate()
    local = streams != "DTensor"
    for block in model.blocks:
        norm = {"norm": SequenceParallel()} if sharded else {}
        for branch, entering in ((block.f, ("q", "k", "v")), (block.g, ("enter",))):
            columns = {name: ColwiseParallel(input_layouts=between) for name in entering}
            rows = {"leave": RowwiseParallel(output_layouts=between, use_local_output=local)}
            parallelize_module(branch, mesh, {**norm, **columns, **rows})


def tensor_parallel(streams: str, rank: int, world_size: int) -> None:
    mesh = init_device_mesh("cpu", (world_size,))
    x, target = batch(1)
    twin = stored_copy(pairs())
    leaf = x.clone().requires_grad_()
    (twin(leaf) * target).sum().backward()
    expected = {name: p.grad for name, p in twin.named_parameters()}
    part = (
        slice(None)
        if streams == "whole"
        else slice(rank * TOKENS // world_size, (rank + 1) * TOKENS // world_size)
    )
    for kind in ("float", FINE):
        bits: dict[str, dict[str, Tensor]] = {}
        for execution in EXECUTIONS:
            model = ReversibleSequence(pairs(), streams=kind, execution=execution)
            split_over(mesh, model, streams)
            if streams == "DTensor":
                mine = distribute_tensor(x, mesh, [Shard(1)]).detach().requires_grad_()
                (
                    model(mine) * distribute_tensor(target, mesh, [Shard(1)])
                ).sum().full_tensor().backward()
            else:
                mine = x[:, part].clone().requires_grad_()
                (model(mine) * target[:, part]).sum().backward()
            for name, parameter in model.named_parameters():
                assert_near(full(parameter.grad), expected[name], f"{execution} {name}", 1e-10)
            x_grad = full(mine.grad) if streams == "DTensor" else mine.grad
            x_expected = leaf.grad if streams == "DTensor" else leaf.grad[:, part]
            assert_near(x_grad, x_expected, "x", 1e-10)
            bits[execution] = {name: full(p.grad) for name, p in model.named_parameters()}
        if kind is FINE:
            for result in bits.values():
                assert_bits(result, bits["store"])


def two_dimensional(streams: str, rank: int, world_size: int) -> None:
    """FSDP2 over pairs of ranks that split the branches between them."""
    mesh = init_device_mesh("cpu", (2, world_size // 2), mesh_dim_names=("data", "tensor"))
    x, target = batch(2)
    twin = stored_copy(pairs(2))
    loss_of(twin(x), target).backward()
    expected = {name: p.grad for name, p in twin.named_parameters()}
    examples = slice(2 * (rank // 2), 2 * (rank // 2) + 2)
    tokens = (
        slice(None)
        if streams == "whole"
        else slice(rank % 2 * TOKENS // 2, (rank % 2 + 1) * TOKENS // 2)
    )
    for by_branch, execution in ((True, "invert"), (True, "checkpoint"), (False, "invert")):
        model = ReversibleSequence(pairs(2), streams=FINE, execution=execution)
        split_over(mesh["tensor"], model, streams)
        for block in model.blocks:
            for module in (block.f, block.g) if by_branch else (block,):
                fully_shard(module, mesh=mesh["data"])
        fully_shard(model, mesh=mesh["data"])
        for _ in range(2):
            model.zero_grad()
            loss = loss_of(model(x[examples, tokens]), target[examples, tokens])
            (loss if streams == "whole" else loss / 2).backward()
        for name, parameter in model.named_parameters():
            assert_near(full(parameter.grad), expected[name], f"{execution} {name}", 1e-10)


@contextlib.contextmanager
def by_context(mesh: DeviceMesh, *buffers: Tensor) -> Iterator[None]:
    """torch's `context_parallel` over the tokens of the buffers, with a rule for the CPU's
    kernel.
    """
    with torch_ring.context_parallel(
        mesh, buffers=list(buffers), buffer_seq_dims=[1] * len(buffers)
    ):
        # Leaving the context drops it.
        DTensor._op_dispatcher._custom_op_handlers |= RING  # type: ignore[operator]
        yield


def in_thread(fn: Callable[[], Any]) -> None:
    """Calls `fn` in a fresh thread, as the devices' threads of autograd call replays."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(fn).result()


def context_parallel(rank: int, world_size: int) -> None:
    """Each rank has some of the tokens, dealt out by torch; keys and values go around, in replays
    too.
    """
    mesh = init_device_mesh("cpu", (world_size,))
    # It would add up the ring's parts in float32.
    torch_ring._cp_options.convert_to_f32 = False
    tokens = 4 * world_size
    generator = torch.Generator().manual_seed(11)
    x, target = (
        torch.randn(2, tokens, WIDTH, dtype=torch.float64, generator=generator) for _ in range(2)
    )
    torch.manual_seed(7)
    blocks = [(Causal().double(), Mlp(WIDTH).double()) for _ in range(3)]
    twin = stored_copy(blocks)
    leaf = x.clone().requires_grad_()
    (twin(leaf) * target).sum().backward()
    expected = {name: p.grad for name, p in twin.named_parameters()}
    for kind in ("float", FINE):
        bits: dict[str, dict[str, Tensor | None]] = {}
        for execution in EXECUTIONS:
            for how in (in_thread, operator.call):
                model = ReversibleSequence(blocks, streams=kind, execution=execution)
                model.zero_grad()
                with by_context(mesh, x, target):
                    assert x.shape[1] == tokens // world_size
                    mine = x.clone().requires_grad_()
                    how((model(mine) * target).sum().backward)
                for parameter in model.parameters():
                    dist.all_reduce(parameter.grad)
                whole = torch_ring.context_parallel_unshard(mesh, [mine.grad], [1])[0]
                assert_near(whole, leaf.grad, f"{execution} x", 1e-10)
                bits[execution] = {name: p.grad.clone() for name, p in model.named_parameters()}
                for name, gradient in bits[execution].items():
                    assert_near(gradient, expected[name], f"{execution} {name}", 1e-10)
        if kind is FINE:
            for result in bits.values():
                assert_bits(result, bits["store"])


def context_left_too_early(rank: int, world_size: int) -> None:
    """Outside the context a replay would attend to the rank's own tokens alone: that is an error,
    on every rank.
    """
    mesh = init_device_mesh("cpu", (world_size,))
    torch.manual_seed(7)
    blocks = [(Causal().double(), Mlp(WIDTH).double()) for _ in range(3)]
    for execution in ("invert", "checkpoint"):
        model = ReversibleSequence(blocks, execution=execution)
        x = torch.randn(2, 4 * world_size, WIDTH, dtype=torch.float64)
        with by_context(mesh, x):
            loss = model(x).sum()
        with pytest.raises(ReversibleError, match="did not do the same work twice"):
            loss.backward()


class Stage(nn.Module):
    """A part of a reversible network. Two streams pass from one stage to the next."""

    def __init__(self, sequence: ReversibleSequence, first: bool, last: bool) -> None:
        super().__init__()
        self.sequence, self.first, self.last = sequence, first, last

    def forward(self, x1: Tensor, x2: Tensor | None = None) -> Any:
        y1, y2 = self.sequence.run(x1, x1 if self.first else x2)
        return (y1 + y2) / 2 if self.last else (y1, y2)


def stage_of(
    rank: int, world_size: int, depth: int, execution: str, width: int = WIDTH, **options: Any
) -> Stage:
    torch.manual_seed(7)
    every = [(Mlp(width).double(), Mlp(width).double()) for _ in range(depth * world_size)]
    own = every[depth * rank : depth * (rank + 1)]
    return Stage(
        ReversibleSequence(own, execution=execution, **options), rank == 0, rank == world_size - 1
    )


def scheduled(
    kind: Any, stage: Stage, micro: int, example: Tensor, rank: int, world_size: int
) -> Any:
    """The schedule of this rank's stage.

    The stage is told the shapes. Left to infer them, PipelineStage runs it on uninitialised memory
    first, and fixed streams report whatever values that has.
    """
    stream = example.clone().requires_grad_()
    inputs = (example,) if stage.first else (stream, stream)
    outputs = (stream,) if stage.last else (stream, stream)
    pipe = PipelineStage(
        stage, rank, world_size, torch.device("cpu"), input_args=inputs, output_args=outputs
    )
    return kind(pipe, n_microbatches=micro, loss_fn=loss_of)


def run_schedule(schedule: Any, rank: int, world_size: int, x: Tensor, target: Tensor) -> None:
    if rank == 0:
        schedule.step(x)
    elif rank == world_size - 1:
        schedule.step(target=target)
    else:
        schedule.step()


def pipeline(kind: Any, rank: int, world_size: int) -> None:
    depth, micro = 2, 4
    torch.manual_seed(1)
    x = torch.randn(micro * 2, TOKENS, WIDTH, dtype=torch.float64)
    target = torch.randn(x.shape, dtype=torch.float64)
    torch.manual_seed(7)
    twin = stored_copy(
        [(Mlp(WIDTH).double(), Mlp(WIDTH).double()) for _ in range(depth * world_size)]
    )
    for piece, goal in zip(x.chunk(micro), target.chunk(micro), strict=True):
        (loss_of(twin(piece), goal) / micro).backward()
    expected = {name: p.grad for name, p in twin.named_parameters()}
    for streams in ("float", FINE):
        for execution in EXECUTIONS:
            stage = stage_of(rank, world_size, depth, execution, streams=streams)
            schedule = scheduled(kind, stage, micro, x[:2], rank, world_size)
            run_schedule(schedule, rank, world_size, x, target)
            for name, parameter in stage.sequence.named_parameters():
                _, place, rest = name.split(".", 2)
                whole = f"blocks.{int(place) + depth * rank}.{rest}"
                assert_near(parameter.grad, expected[whole], f"{execution} {whole}", 1e-10)


def peak(kind: Any, execution: str, depth: int, micro: int, rank: int, world_size: int) -> float:
    """What one step of the schedule holds at once, in streams of one micro-batch, its gradients
    made before.
    """
    width, tokens = 16, 64
    stage = stage_of(rank, world_size, depth, execution, width, streams="float")
    x = torch.randn(micro, tokens, width, dtype=torch.float64)
    schedule = scheduled(kind, stage, micro, x[:1], rank, world_size)
    run_schedule(schedule, rank, world_size, x, x)
    report = measure_memory(run_schedule, schedule, rank, world_size, x, x)
    return report.peak_bytes / (tokens * width * 8)


def pipeline_memory(rank: int, world_size: int) -> None:
    """A micro-batch in flight keeps two streams per stage, whatever the depth.

    The last stage has them and, held by torch's pipelining, its two inputs and the network's
    output. Since torch 2.15 it also has two streams in which it received them, until the step ends:
    earlier versions allocate those for all micro-batches before, which is not measured.
    """
    received = 0 if torch.__version__ < "2.15" else 2
    for execution, depths in (("invert", (2, 8)), ("store", (2,))):
        for depth in depths:
            few, many = (
                peak(ScheduleGPipe, execution, depth, micro, rank, world_size) for micro in (4, 8)
            )
            each = (many - few) / 4
            if execution == "store":
                assert each > 20, f"stored execution keeps {each} streams per micro-batch"
            else:
                assert each == pytest.approx(2 if rank == 0 else 5 + received, abs=0.1), (
                    f"{each} streams at depth {depth}"
                )
    # 1F1B holds at most as many micro-batches as there are stages to come: their number does not
    # matter. What grows in the last stage is what torch keeps for the whole step.
    few, many = (peak(Schedule1F1B, "invert", 2, micro, rank, world_size) for micro in (4, 8))
    assert (many - few) / 4 == pytest.approx(0 if rank == 0 else 1 + received, abs=0.1)


CHECKS = {
    "tensor": partial(tensor_parallel, "whole"),
    "tensor-sequence": partial(tensor_parallel, "sharded"),
    "tensor-DTensor": partial(tensor_parallel, "DTensor"),
    "context": context_parallel,
    "context-left": context_left_too_early,
    "pipeline-gpipe": partial(pipeline, ScheduleGPipe),
    "pipeline-1f1b": partial(pipeline, Schedule1F1B),
    "pipeline-memory": pipeline_memory,
}

CHECKS_ON_FOUR = {
    "context": context_parallel,
    "fsdp-tensor": partial(two_dimensional, "whole"),
    "fsdp-tensor-sequence": partial(two_dimensional, "sharded"),
}


@pytest.fixture(scope="module")
def on_two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return run_checks(__name__, 2, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def on_four(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return run_checks(__name__, 4, tmp_path_factory.mktemp("ranks"), "CHECKS_ON_FOUR")


@pytest.mark.parametrize("name", CHECKS)
def test_model_parallel(name: str, on_two: dict[str, str]) -> None:
    if on_two[name] != "passed":
        pytest.fail(on_two[name], pytrace=False)


@pytest.mark.parametrize("name", CHECKS_ON_FOUR)
def test_two_dimensional(name: str, on_four: dict[str, str]) -> None:
    if on_four[name] != "passed":
        pytest.fail(on_four[name], pytrace=False)


@pytest.mark.parametrize(
    ("tokens", "fits"), [(32, False), (48, False), (64, True), (96, False), (128, True)]
)
def test_ring_of_the_padding_kernel(tokens: int, fits: bool) -> None:
    """docs/scaling.md: around CUDA's memory-efficient kernel, torch's ring needs a multiple of 64
    tokens per rank.

    The kernel pads the sums of a half of them to 32 rows, and the ring does not expect it.
    """
    module = sys.modules[torch_ring._templated_ring_attention.__module__]
    q = torch.empty(1, 2, tokens, 8, device="meta")
    failures = 0
    for rank in range(2):
        dist.init_process_group("fake", rank=rank, world_size=2, store=FakeStore())
        try:
            module._scaled_dot_product_ring_efficient_attention(
                init_device_mesh("cpu", (2,)), q, q, q, is_causal=True
            )
        except RuntimeError:
            failures += 1
        finally:
            dist.destroy_process_group()
    assert (failures == 0) == fits
