"""Shapes, memory layouts and dtypes of streams and branches."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from cases import Convolution, Gate, Linear, Mlp, SavesInput, build, randn
from oracle import (
    assert_near,
    assert_same_gradients,
    assert_same_step,
    gradients_of,
    stored_copy,
    train_step,
    weighted,
)
from revnet import ReversibleSequence

SHAPES = {
    "1d": ((8,), {}),
    "2d": ((5, 8), {}),
    "3d": ((2, 6, 8), {}),
    "3d-one-token": ((1, 1, 8), {}),
    "4d-channels-last": ((2, 3, 4, 8), {}),
    "5d": ((2, 1, 3, 2, 8), {}),
    "3d-empty-batch": ((0, 6, 8), {}),
    "2d-chunk": ((5, 8), {"split": "chunk", "merge": "concat"}),
    "3d-chunk": ((2, 6, 8), {"split": "chunk", "merge": "concat"}),
    "3d-chunk-positive-dim": ((2, 6, 8), {"split": "chunk", "merge": "concat", "dim": 2}),
    "3d-chunk-mean": ((2, 6, 8), {"split": "chunk", "merge": "mean"}),
    "3d-copy-concat": ((2, 6, 8), {"merge": "concat"}),
    "3d-copy-sum": ((2, 6, 8), {"merge": "sum"}),
    "4d-chunk": ((2, 3, 4, 8), {"split": "chunk", "merge": "sum"}),
}


@pytest.mark.parametrize("branch", [Linear, Mlp, Gate])
@pytest.mark.parametrize(("shape", "options"), SHAPES.values(), ids=SHAPES)
def test_any_shape(shape: tuple[int, ...], options: dict, branch: type[nn.Module]):
    pairs = build([(branch, branch)] * 3, 4 if options.get("split") == "chunk" else 8)
    net, oracle = ReversibleSequence(pairs, **options), stored_copy(pairs, **options)
    x = randn(*shape, requires_grad=True)
    assert_same_step(train_step(net, x), train_step(oracle, x))


@pytest.mark.parametrize(
    "layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels-last"]
)
@pytest.mark.parametrize(
    "options", [{}, {"split": "chunk", "merge": "concat", "dim": 1}], ids=["copy", "chunk"]
)
def test_images(options: dict, layout: torch.memory_format):
    pairs = build([(Convolution, Convolution)] * 3, 3 if options else 6)
    net, oracle = ReversibleSequence(pairs, **options), stored_copy(pairs, **options)
    found = []
    for module in (net, oracle):
        source = randn(2, 6, 5, 4, requires_grad=True)
        out = module(source.to(memory_format=layout) * 1)
        weighted(out).backward()
        found.append({"out": out.detach(), "x": source.grad, **gradients_of(module)})
        strides = out.stride()
    assert_same_gradients(*found)
    assert net(source.to(memory_format=layout)).stride() == strides


def test_tokens_in_the_middle_of_the_shape():
    pairs = build([(SavesInput, SavesInput)] * 2, 8)
    options = {"split": "chunk", "merge": "concat", "dim": 0}
    net, oracle = ReversibleSequence(pairs, **options), stored_copy(pairs, **options)
    x = randn(4, 3, 2, requires_grad=True)
    assert_same_step(train_step(net, x), train_step(oracle, x))


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "expanded-batch": lambda t: t[:1].expand(3, 4, 8),
    "expanded-tokens": lambda t: t[:, :1].expand(3, 4, 8),
    "expanded-everywhere": lambda t: t[:1, :1].expand(3, 4, 8),
    "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "strided": lambda t: torch.stack((t, t), -1).flatten(-2)[..., ::2],
    "sliced": lambda t: torch.cat((t, t, t), -1)[..., 8:16],
    "width-first": lambda t: t.permute(2, 0, 1).contiguous().permute(1, 2, 0),
}


class Viewing(nn.Module):
    """Views its input, which only some layouts allow, and saves it in the layout it came in."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * x.view(x.shape).sin() * x.transpose(0, -1).cos().transpose(0, -1)


@pytest.mark.parametrize(
    "options", [{}, {"split": "chunk", "merge": "concat"}], ids=["copy", "chunk"]
)
@pytest.mark.parametrize("branch", [Linear, Mlp, Viewing])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_any_memory_layout(
    layout: Callable[[Tensor], Tensor], branch: type[nn.Module], options: dict
):
    pairs = build([(branch, branch)] * 3, 4 if options else 8)
    net, oracle = ReversibleSequence(pairs, **options), stored_copy(pairs, **options)
    found = []
    for module in (net, oracle):
        source = randn(3, 4, 8, requires_grad=True)
        weighted(module(layout(source))).backward()
        found.append({"x": source.grad, **gradients_of(module)})
    assert_same_gradients(*found)


@pytest.mark.parametrize("first", LAYOUTS.values(), ids=LAYOUTS)
def test_run_with_streams_of_different_layouts(first: Callable[[Tensor], Tensor]):
    pairs = build([(Linear, Viewing)] * 3, 8)
    net, oracle = ReversibleSequence(pairs), stored_copy(pairs)
    found = []
    for module in (net, oracle):
        a, b = randn(3, 4, 8, requires_grad=True), randn(3, 4, 8, seed=2, requires_grad=True)
        weighted(*module.run(first(a), b)).backward()
        found.append({"a": a.grad, "b": b.grad, **gradients_of(module)})
    assert_same_gradients(*found)


def test_an_output_in_another_layout_than_the_stream():
    class Turned(Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).transpose(0, 1).contiguous().transpose(0, 1)

    pairs = build([(Turned, Linear)] * 3, 8)
    net, oracle = ReversibleSequence(pairs), stored_copy(pairs)
    x = randn(3, 4, 8, requires_grad=True)
    assert_same_step(train_step(net, x), train_step(oracle, x))


class InDtype(nn.Module):
    """Computes and returns in its own dtype, whatever the stream's."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear, self.dtype = nn.Linear(width, width, bias=False, dtype=dtype), dtype

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.to(self.dtype)).relu()


DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


@pytest.mark.parametrize("branch", DTYPES, ids=lambda d: f"branch-{str(d)[6:]}")
@pytest.mark.parametrize("stream", DTYPES, ids=lambda d: f"stream-{str(d)[6:]}")
def test_streams_keep_their_dtype_and_outputs_are_cast_to_it(
    stream: torch.dtype, branch: torch.dtype
):
    pairs = [(InDtype(4, branch), InDtype(4, branch)) for _ in range(2)]
    for place, module in enumerate(m for pair in pairs for m in pair):
        # Small whole numbers: sums and products are exact in every dtype, and so is the inversion.
        with torch.no_grad():
            module.linear.weight.copy_(
                torch.randint(-1, 2, (4, 4), generator=torch.Generator().manual_seed(place))
            )
    net, oracle = ReversibleSequence(pairs, merge="concat"), stored_copy(pairs, merge="concat")
    found = []
    for module in (net, oracle):
        x = torch.arange(-4, 4, dtype=stream).view(2, 4).requires_grad_()
        out = module(x)
        assert out.dtype is stream
        out.sum().backward()
        assert x.grad.dtype is stream
        found.append({"out": out.detach(), "x": x.grad, **gradients_of(module)})
    for name, value in found[1].items():
        assert torch.equal(found[0][name], value), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_low_precision_is_near_the_stored_loop(dtype: torch.dtype):
    pairs = [(f.to(dtype), g.to(dtype)) for f, g in build([(Mlp, Mlp)] * 4, 8)]
    net, oracle = ReversibleSequence(pairs), stored_copy(pairs)
    x = randn(2, 6, 8, dtype=dtype, requires_grad=True)
    actual, expected = train_step(net, x), train_step(oracle, x)
    tolerance = 1e-5 if dtype is torch.float32 else 5e-2
    assert_near(actual.output, expected.output, tolerance=tolerance)
    assert_same_gradients(actual.gradients, expected.gradients, tolerance)
