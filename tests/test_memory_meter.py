import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from revnet import MemoryReport, measure_memory

N = 1000
FLOATS = 4 * N  # bytes of a vector of N float32
SCALAR = 4

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


def leaf(device, *shape):
    return torch.rand(*shape or (N,), device=device, requires_grad=True)


# ---- counted by hand


def test_saved_is_what_waits_for_backward(device):
    w, x = leaf(device), torch.rand(N, device=device)
    # mul saves x, which is older; tanh saves its result. Backward holds two vectors at a time.
    report = measure_memory(lambda: (x * w).tanh().sum())
    assert report == MemoryReport(
        saved_bytes=FLOATS, peak_bytes=2 * FLOATS + SCALAR, grad_bytes=FLOATS
    )


def test_what_the_returned_value_reaches_is_not_saved(device):
    w, x = leaf(device), torch.rand(N, device=device)
    # tanh saves its result, which is also what it returns.
    report = measure_memory(lambda: (x * w).tanh())
    assert report == MemoryReport(saved_bytes=0, peak_bytes=3 * FLOATS, grad_bytes=FLOATS)


def test_views_count_as_their_whole_storage(device):
    w, x = leaf(device), torch.rand(N, device=device)
    # Both chunks are saved by the multiplication and both lie in one storage.
    assert measure_memory(lambda: torch.mul(*(x * w).chunk(2)).sum()).saved_bytes == FLOATS
    assert measure_memory(lambda: (x * w).chunk(2)[0]).saved_bytes == 0


def test_linear_layers_save_their_inputs(device):
    batch, width, hidden = 8, 16, 32
    net = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width)).to(device)
    report = measure_memory(net, torch.rand(batch, width, device=device))
    # The input is older, relu's result and the second layer's input are one tensor, the output is
    # returned.
    assert report.saved_bytes == 4 * batch * hidden
    assert report.grad_bytes == 4 * (2 * width * hidden + hidden + width)


def test_peak_of_temporaries(device):
    def fn():
        a = torch.empty(N, device=device)
        b = torch.empty(2 * N, device=device)
        del a
        c = torch.empty(N // 2, device=device)
        del b, c

    assert measure_memory(fn) == MemoryReport(saved_bytes=0, peak_bytes=3 * FLOATS, grad_bytes=0)


def test_what_the_function_stores_elsewhere_is_saved(device):
    kept = []
    report = measure_memory(lambda: kept.append(torch.empty(N, device=device)))
    assert report == MemoryReport(saved_bytes=FLOATS, peak_bytes=FLOATS, grad_bytes=0)


def test_only_gradients_that_the_call_created_count(device):
    w, v = leaf(device), leaf(device)
    v.grad = torch.zeros(N, device=device)
    assert measure_memory(lambda: w * v).grad_bytes == FLOATS
    assert measure_memory(lambda: w * v).grad_bytes == 0
    w.grad = None
    v.requires_grad_(False)
    assert measure_memory(lambda: w * v).grad_bytes == FLOATS


def test_a_gradient_replaced_during_the_call_is_created_by_it():
    w, x = leaf("cpu"), torch.rand(N)
    w.grad = torch.zeros(N)

    def step():
        w.grad = None
        (w * x).sum().backward()

    assert measure_memory(step) == MemoryReport(
        saved_bytes=FLOATS, peak_bytes=FLOATS + 2 * SCALAR, grad_bytes=FLOATS
    )


def test_gradients_that_share_a_storage_count_once(device):
    w, v = leaf(device), leaf(device)

    def fn():
        w.grad, v.grad = torch.zeros(2 * N, device=device).chunk(2)

    assert measure_memory(fn) == MemoryReport(2 * FLOATS, 2 * FLOATS, 2 * FLOATS)


def test_sparse_gradients_count_indices_and_values(device):
    table = nn.Embedding(100, 8, sparse=True, device=device)
    assert measure_memory(table, torch.arange(5, device=device)).grad_bytes == 5 * 8 + 5 * 8 * 4


def test_gradient_kept_on_an_intermediate(device):
    w, x = leaf(device), torch.rand(N, device=device)

    def fn():
        h = w * x
        h.retain_grad()
        return h, (h * x).sum()

    assert measure_memory(fn).grad_bytes == 2 * FLOATS


# ---- the kinds of function


@dataclass
class Output:
    loss: torch.Tensor
    hidden: list


@pytest.mark.parametrize(
    "pack",
    [
        lambda *t: t,
        lambda *t: [t],
        lambda *t: {"a": t[0], "rest": [t[1:], None, "text", 3]},
        lambda *t: Output(t[0], [t[1], {"z": t[2]}]),
        lambda *t: (t, t),
    ],
    ids=["tuple", "list", "dict", "dataclass", "twice"],
)
def test_containers(device, pack):
    leaves = [leaf(device) for _ in range(3)]
    x = torch.rand(N, device=device)
    report = measure_memory(lambda: pack(*[(w * x).tanh() for w in leaves]))
    assert report.saved_bytes == 0
    assert report.grad_bytes == 3 * FLOATS


def test_the_gradient_is_that_of_the_sum(device):
    w, x = leaf(device), torch.rand(N, device=device)
    measure_memory(lambda: {"a": w * x, "b": [w.sum(), torch.ones(3, device=device)]})
    torch.testing.assert_close(w.grad, x + 1)


def test_returning_what_was_there_already(device):
    w, x = leaf(device), torch.rand(N, device=device)
    assert measure_memory(lambda: x) == MemoryReport(0, 0, 0)
    assert measure_memory(lambda: x[:3]) == MemoryReport(0, 0, 0)
    assert measure_memory(lambda: w) == MemoryReport(0, FLOATS, FLOATS)


def test_no_grad_inside(device):
    w, x = leaf(device), torch.rand(N, device=device)

    @torch.no_grad()
    def fn():
        return (w * x).tanh()

    assert measure_memory(fn) == MemoryReport(saved_bytes=0, peak_bytes=2 * FLOATS, grad_bytes=0)


@pytest.mark.parametrize("outside", [torch.no_grad, torch.inference_mode])
def test_no_grad_outside(device, outside):
    w, x = leaf(device), torch.rand(N, device=device)
    with outside():
        assert measure_memory(lambda: (w * x).tanh()) == MemoryReport(0, 2 * FLOATS, 0)
    with torch.no_grad():
        assert measure_memory(torch.enable_grad()(lambda: (w * x).tanh())) == MemoryReport(
            0, 3 * FLOATS, FLOATS
        )


def test_a_backward_of_its_own(device):
    w, x = leaf(device), torch.rand(N, device=device)

    def step():
        (x * w).tanh().sum().backward()

    report = measure_memory(step)
    assert (report.saved_bytes, report.grad_bytes) == (FLOATS, FLOATS)


def test_arguments_are_passed_on(device):
    x = torch.rand(N, device=device)
    report = measure_memory(torch.add, x, x, alpha=2)
    assert report == MemoryReport(0, FLOATS, 0)


# ---- what must not disturb it


@pytest.mark.parametrize("transform", ["vmap", "grad", "both"])
def test_tensors_that_torch_func_left_over(device, transform):
    left = []

    def fn(x):
        left.append((x * 2).detach())
        return x.sum()

    functions = {
        "vmap": torch.func.vmap(fn),
        "grad": torch.func.grad(fn),
        "both": torch.func.vmap(torch.func.grad(fn)),
    }
    functions[transform](
        torch.rand(3, N, device=device) if transform != "grad" else torch.rand(N, device=device)
    )
    w, x = leaf(device), torch.rand(N, device=device)
    assert measure_memory(lambda: w * x) == MemoryReport(0, 2 * FLOATS, FLOATS)
    assert measure_memory(lambda: left) == MemoryReport(0, 0, 0)


def test_memory_from_before_that_the_call_frees_does_not_count():
    held = [torch.empty(N)]

    def fn():
        held.clear()
        held.append(torch.empty(N // 2))

    assert measure_memory(fn) == MemoryReport(FLOATS // 2, FLOATS // 2, 0)


def test_blocks_of_an_earlier_measurement_are_not_mistaken_for_new_ones():
    held = []
    measure_memory(lambda: held.extend(torch.empty(N) for _ in range(50)))
    held.clear()
    # The allocator hands out the same addresses, which torch still knows under their old sizes.
    held.extend(torch.empty(N) for _ in range(50))
    assert measure_memory(held.clear) == MemoryReport(0, 0, 0)


def test_nothing_is_kept_between_measurements(device):
    w, x = leaf(device), torch.rand(N, device=device)
    seen = []

    def fn():
        h = w * x
        seen.append(StorageWeakRef(h.untyped_storage()))
        return h.tanh()

    first = measure_memory(fn)
    w.grad = None
    assert first == measure_memory(fn)
    assert all(reference.expired() for reference in seen)


def test_random_state_is_memory_too():
    kept = []
    assert measure_memory(lambda: kept.append(torch.get_rng_state())).saved_bytes == 5056


class FailingBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise ValueError("in backward")


def test_an_exception_leaves_nothing_behind(device):
    w, x = leaf(device), torch.rand(N, device=device)
    expected = MemoryReport(0, 3 * FLOATS, FLOATS)

    def fail():
        (w * x).tanh()
        raise ValueError("in forward")

    for fn, message in ((fail, "in forward"), (lambda: FailingBackward.apply(w), "in backward")):
        with pytest.raises(ValueError, match=message):
            measure_memory(fn)
        assert not torch.autograd._profiler_enabled()
        assert measure_memory(lambda: (w * x).tanh()) == expected
        w.grad = None


def test_a_running_profiler_is_refused():
    with torch.autograd.profiler.profile(), pytest.raises(RuntimeError, match="let it end first"):
        measure_memory(lambda: None)


def test_a_second_measurement_at_the_same_time_is_refused():
    # torch has one profiler for the process: two threads that start one crash it.
    with ThreadPoolExecutor(1) as pool:

        def fn():
            with pytest.raises(RuntimeError, match="let it end first"):
                measure_memory(torch.ones, 3)
            with pytest.raises(RuntimeError, match="let it end first"):
                pool.submit(measure_memory, torch.ones, 3).result()

        measure_memory(fn)
        assert pool.submit(measure_memory, torch.ones, 3).result() == MemoryReport(0, 12, 0)


def test_nothing_is_printed_and_the_environment_is_left_alone():
    script = """
import os, torch, revnet
before = dict(os.environ)
revnet.measure_memory(torch.ones, 3)
revnet.measure_memory(torch.ones, 3)
assert dict(os.environ) == before
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout + done.stderr == ""


# ---- against two other ways of counting: the live storages that operations made, and the
# profiler's exported trace


class LiveStorages(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.sizes = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        older = {
            t.untyped_storage()._cdata
            for t in tree_leaves((args, kwargs))
            if isinstance(t, torch.Tensor)
        }
        out = func(*args, **kwargs or {})
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.untyped_storage()._cdata not in older:
                self.sizes[StorageWeakRef(t.untyped_storage())] = t.untyped_storage().nbytes()
        return out

    def held(self):
        return sum(size for reference, size in self.sizes.items() if not reference.expired())


def attention(width):
    return nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.0, batch_first=True)


NETS = {
    "mlp": lambda: (nn.Sequential(nn.Linear(24, 48), nn.GELU(), nn.Linear(48, 24)), (6, 24)),
    "dropout": lambda: (nn.Sequential(nn.Linear(24, 48), nn.Dropout(0.5), nn.Tanh()), (6, 24)),
    "norms": lambda: (
        nn.Sequential(nn.LayerNorm(24), nn.Linear(24, 24), nn.BatchNorm1d(24)),
        (6, 24),
    ),
    "attention": lambda: (attention(16), (2, 10, 16)),
    "deep": lambda: (nn.Sequential(*[nn.Linear(24, 24) for _ in range(30)]), (6, 24)),
    "convolution": lambda: (
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2)),
        (2, 3, 12, 12),
    ),
}


@pytest.fixture(params=NETS)
def net_and_input(request):
    net, shape = NETS[request.param]()
    return net, torch.rand(shape, requires_grad=True)


def gradient_bytes(tensors):
    return sum(t.grad.untyped_storage().nbytes() for t in tensors)


def test_saved_bytes_agree_with_the_live_storages(net_and_input):
    net, x = net_and_input
    report = measure_memory(net, x)
    assert report.grad_bytes == gradient_bytes([x, *net.parameters()])
    with LiveStorages() as live:
        y = net(x)
        assert report.saved_bytes == live.held() - y.untyped_storage().nbytes()


def test_peak_agrees_with_the_exported_trace(net_and_input, tmp_path):
    net, x = net_and_input
    report = measure_memory(net, x)
    net.zero_grad()
    x.grad = None

    one = torch.ones(())
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        y = net(x)
        y.backward(one.expand_as(y))
    profile.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    sizes = [
        e["args"]["Bytes"]
        for e in sorted(events, key=lambda e: e.get("ts", 0))
        if e["name"] == "[memory]"
    ]
    assert report.peak_bytes == max(accumulate(sizes))
    assert sum(sizes) == gradient_bytes([x, *net.parameters()]) + y.untyped_storage().nbytes()


# ---- CUDA


@pytest.mark.gpu
def test_a_function_on_the_cpu_is_measured_there_also_when_cuda_is_in_use():
    torch.zeros(1, device="cuda")
    w, x = leaf("cpu"), torch.rand(N)
    assert measure_memory(lambda: (x * w).tanh()) == MemoryReport(0, 3 * FLOATS, FLOATS)


@pytest.mark.gpu
def test_workspaces_of_the_libraries_are_not_counted():
    script = """
import torch, revnet
net = torch.nn.Linear(64, 64, device="cuda")
x = torch.rand(64, 64, device="cuda", requires_grad=True)
report = revnet.measure_memory(lambda: net(x).exp().sum())
assert report.saved_bytes == 4 * 64 * 64, report
assert report.grad_bytes == 4 * (2 * 64 * 64 + 64), report
assert report.peak_bytes < 4 * 64 * 64 * 8, report
"""
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.gpu
def test_a_block_larger_than_the_request_counts_as_the_request():
    # The allocator may hand out a cached block of 21 MiB whole for 20.5 MiB.
    block = torch.empty(21 * 2**20, dtype=torch.uint8, device="cuda")
    del block
    size = 20 * 2**20 + 2**19
    assert measure_memory(torch.empty, size, dtype=torch.uint8, device="cuda") == MemoryReport(
        0, size, 0
    )
