"""Fixed-point streams: the arithmetic against Python integers, and every implementation against the reference."""

from __future__ import annotations

import copy
import itertools
import math
import os
import pickle
from fractions import Fraction
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from revnet import _streams
from revnet._streams import Fixed, Float, RangeMonitor, checksum, fitting_fraction_bits, fixed_add, fixed_encode

# Raised inside torch: by a module that its compiler imports, and by the compiler where it traces a Function.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]

FORMATS = [Fixed(16), Fixed(31, torch.int32), Fixed(), Fixed(62)]
FORMAT_IDS = [f"{fixed.fraction_bits}-{str(fixed.dtype)[6:]}" for fixed in FORMATS]
FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
FLOAT_IDS = [str(dtype)[6:] for dtype in FLOATS]
RANGE_BITS = {torch.int32: 31, torch.int64: 62}

every_format = pytest.mark.parametrize("fixed", FORMATS, ids=FORMAT_IDS)
every_increment = pytest.mark.parametrize("increment_dtype", FLOATS, ids=FLOAT_IDS)
every_value = pytest.mark.parametrize("value_dtype", FLOATS, ids=FLOAT_IDS)

# Without CUDA, Triton's interpreter runs the kernel: TRITON_INTERPRET=1 pytest -k "kernel and not bfloat16]" (it
# truncates to bfloat16 where a device rounds) -W ignore::RuntimeWarning (NumPy's, for overflows that are meant).
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and not torch.cuda.is_available()
DEVICE = "cpu" if INTERPRETED else "cuda"
ON_KERNEL = pytest.param("kernel", marks=() if INTERPRETED else pytest.mark.gpu)


@pytest.fixture(params=["reference", "cpu", "cpu-pieces", ON_KERNEL])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return combine(fixed, held, increment, sign, dtype, monitor, step) -> (new, value), on CPU tensors."""
    if request.param == "kernel":
        need_kernel()
        return combine_kernel
    if request.param == "cpu-pieces":
        monkeypatch.setattr(_streams, "_PIECE", 3)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    return reference if request.param == "reference" else combine


def combine(
    fixed: Fixed, held: Tensor, increment: Tensor, sign: int, dtype: torch.dtype, *watch: Any
) -> tuple[Tensor, Tensor]:
    return fixed.add(held, increment, dtype, *watch) if sign > 0 else fixed.subtract(held, increment, dtype)


def reference(
    fixed: Fixed,
    held: Tensor,
    increment: Tensor,
    sign: int,
    dtype: torch.dtype,
    monitor: RangeMonitor | None = None,
    step: int = 0,
) -> tuple[Tensor, Tensor]:
    return fixed._combine(held, increment, sign, dtype, monitor, step)


def need_cuda() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


def need_kernel() -> None:
    if not INTERPRETED:
        need_cuda()
    pytest.importorskip("triton")


def combine_kernel(
    fixed: Fixed,
    held: Tensor | None,
    increment: Tensor | None,
    sign: int,
    dtype: torch.dtype,
    monitor: RangeMonitor | None = None,
    step: int = 0,
) -> tuple[Tensor, Tensor]:
    pattern = held if held is not None else increment
    assert pattern is not None
    new = torch.empty_like(pattern, dtype=fixed.dtype, device=DEVICE)
    value = torch.empty_like(pattern, dtype=dtype, device=DEVICE)
    there = [None if x is None else x.to(DEVICE) for x in (held, increment)]
    assert fixed._launched(*there, None if increment is None else new, value, sign, monitor, step)
    return new.cpu(), value.cpu()


def quantised(value: float, fixed: Fixed) -> int | None:
    """Return value in units of the format, ties to even, or None where it does not fit."""
    if not math.isfinite(value):
        return None
    count = round(Fraction(value) * 2**fixed.fraction_bits)
    return count if abs(count) < 2 ** RANGE_BITS[fixed.dtype] else None


def combined(held: int, increment: float, sign: int, fixed: Fixed) -> int:
    """Return the new integer, the sentinel where there is none."""
    sentinel = torch.iinfo(fixed.dtype).min
    count = quantised(increment, fixed)
    if held == sentinel or count is None or abs(held + sign * count) >= 2 ** RANGE_BITS[fixed.dtype]:
        return sentinel
    return held + sign * count


def read(held: int, fixed: Fixed, dtype: torch.dtype) -> float:
    """Return the value of an integer: rounded to float32 (float64), and from there to a 16-bit type."""
    if held == torch.iinfo(fixed.dtype).min:
        return math.nan
    if dtype == torch.float64:
        return math.ldexp(float(held), -fixed.fraction_bits)
    value = math.ldexp(to_significant(held, 24), -fixed.fraction_bits)
    if dtype == torch.bfloat16:
        mantissa, exponent = math.frexp(value)
        return math.ldexp(to_significant(int(math.ldexp(mantissa, 24)), 8), exponent - 24)
    with np.errstate(over="ignore"):
        return float(np.float16(value)) if dtype == torch.float16 else value


def to_significant(number: int, bits: int) -> int:
    """Round an integer to so many significant bits, ties to even."""
    excess = max(0, abs(number).bit_length() - bits)
    return round(Fraction(number, 2**excess)) * 2**excess


def interesting_integers(fixed: Fixed) -> list[int]:
    top = 2 ** RANGE_BITS[fixed.dtype] - 1
    middle = [0, 1, 2, 12345, 2**24 + 1, 2**24 + 3, 2**25 + 2, top // 2, top // 4, top // 4 + 1, top - 1, top]
    return [torch.iinfo(fixed.dtype).min, *middle, *(-number for number in middle)]


def interesting_floats(fixed: Fixed, dtype: torch.dtype) -> list[float]:
    unit, edge = 2.0**-fixed.fraction_bits, 2.0 ** (RANGE_BITS[fixed.dtype] - fixed.fraction_bits)
    info = torch.finfo(dtype)
    one = torch.ones((), dtype=dtype)
    below = torch.nextafter(one * edge, one * 0).item() if edge < info.max else info.max
    wanted = [0.0, info.smallest_normal, info.smallest_normal * info.eps, info.max, math.inf, below, edge, 1.0, 1 / 3]
    wanted += [unit * factor for factor in (0.5, 0.5 - 2**-10, 0.5 + 2**-7, 1, 1.5, 2.5, 3.5, 12344.5, 2**22 + 0.5)]
    wanted += [edge / 4, edge / 2, edge * 0.75]
    rounded = torch.tensor(wanted, dtype=torch.float64).to(dtype).tolist()
    return [math.nan, *rounded, *(-value for value in rounded)]


def bits(x: Tensor) -> Tensor:
    """Return x's bits as integers; all NaN have the same."""
    if x.is_floating_point():
        x = torch.where(x.isnan(), math.nan, x)
    return x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.stride() == b.stride() and bits(a).equal(bits(b))


@cache
def edges(fixed: Fixed, increment_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return every pair of an interesting integer and an interesting increment."""
    pairs = list(itertools.product(interesting_integers(fixed), interesting_floats(fixed, increment_dtype)))
    held, increment = zip(*pairs, strict=True)
    return torch.tensor(held, dtype=fixed.dtype), torch.tensor(increment, dtype=torch.float64).to(increment_dtype)


@cache
def combined_edges(fixed: Fixed, increment_dtype: torch.dtype, sign: int) -> list[int]:
    pairs = zip(*(x.tolist() for x in edges(fixed, increment_dtype)), strict=True)
    return [combined(integer, value, sign, fixed) for integer, value in pairs]


def values(integers: list[int], fixed: Fixed, dtype: torch.dtype) -> Tensor:
    return torch.tensor([read(integer, fixed, dtype) for integer in integers], dtype=torch.float64).to(dtype)


@every_value
@every_increment
@every_format
def test_combine_at_the_edges(
    implementation: Any, fixed: Fixed, increment_dtype: torch.dtype, value_dtype: torch.dtype
) -> None:
    held, increment = edges(fixed, increment_dtype)
    for sign in (1, -1):
        wanted = combined_edges(fixed, increment_dtype, sign)
        new, value = implementation(fixed, held, increment, sign, value_dtype)
        assert new.dtype == fixed.dtype
        assert new.tolist() == wanted
        assert same(value, values(wanted, fixed, value_dtype))


@every_increment
@every_format
def test_encode_at_the_edges(
    implementation: Any, fixed: Fixed, increment_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.tensor(interesting_floats(fixed, increment_dtype), dtype=torch.float64).to(increment_dtype)
    wanted = [combined(0, value, 1, fixed) for value in x.tolist()]
    if implementation is combine_kernel:
        held, value = combine_kernel(fixed, None, x, 1, increment_dtype)
    else:
        held, value = implementation_of_encode(implementation, monkeypatch)(fixed, x)
    assert held.dtype == fixed.dtype
    assert held.tolist() == wanted
    assert same(value, values(wanted, fixed, increment_dtype))


def implementation_of_encode(implementation: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    if implementation is reference:
        monkeypatch.setattr(_streams, "_fusible", lambda *tensors: False)
    return lambda fixed, x: fixed_encode(x, fixed)[::-1]


@every_value
@every_format
@pytest.mark.parametrize("on", ["reference", ON_KERNEL])
def test_decode_at_the_edges(on: str, fixed: Fixed, value_dtype: torch.dtype) -> None:
    integers = interesting_integers(fixed)
    held = torch.tensor(integers, dtype=fixed.dtype)
    if on == "kernel":
        need_kernel()
        value = combine_kernel(fixed, held, None, 1, value_dtype)[1]
    else:
        value = fixed.decode(held, value_dtype)
    assert same(value, values(integers, fixed, value_dtype))


@given(data=st.data(), fixed=st.sampled_from(FORMATS), increment_dtype=st.sampled_from(FLOATS))
def test_combine_of_anything(
    implementation: Any, data: st.DataObject, fixed: Fixed, increment_dtype: torch.dtype
) -> None:
    top = 2 ** RANGE_BITS[fixed.dtype] - 1
    unit = 2.0**-fixed.fraction_bits
    near = st.integers(-(2**40), 2**40).map(lambda halves: halves * unit / 2)
    number = st.one_of(st.floats(), st.floats(width=16), near, st.integers(-top, top).map(lambda count: count * unit))
    pair = st.tuples(st.integers(-top, top), number)
    integers, numbers = zip(*data.draw(st.lists(pair, min_size=1, max_size=9)), strict=True)
    held = torch.tensor(integers, dtype=fixed.dtype)
    increment = torch.tensor(numbers, dtype=torch.float64).to(increment_dtype)
    wanted = [combined(*pair, 1, fixed) for pair in zip(integers, increment.tolist(), strict=True)]
    new, value = implementation(fixed, held, increment, 1, torch.float32)
    assert new.tolist() == wanted
    assert same(value, values(wanted, fixed, torch.float32))
    back, before = implementation(fixed, new, increment, -1, torch.float16)
    sentinel = torch.iinfo(fixed.dtype).min
    expected = [old if new != sentinel else sentinel for old, new in zip(integers, wanted, strict=True)]
    assert back.tolist() == expected
    assert same(before, values(expected, fixed, torch.float16))


@every_increment
@every_format
def test_subtracting_undoes_a_long_sum(implementation: Any, fixed: Fixed, increment_dtype: torch.dtype) -> None:
    spread = min(fixed.limit / 64, 3000.0)  # float16 ends at 65504
    start = fixed.encode(torch.randn(4, 131, dtype=torch.float64) * spread / 8)
    increments = [(torch.randn(4, 131) * spread * 0.1**i).to(increment_dtype) for i in range(8)]
    held = start
    for increment in increments:
        held, _ = implementation(fixed, held, increment, 1, increment_dtype)
    for increment in reversed(increments):
        held, value = implementation(fixed, held, increment, -1, increment_dtype)
    assert held.equal(start)
    assert same(value, fixed.decode(start, increment_dtype))


@pytest.mark.parametrize("increment", [math.nan, math.inf, -math.inf, 3e38])
def test_what_left_the_range_stays_not_a_number(implementation: Any, increment: float) -> None:
    for fixed in FORMATS:
        held = fixed.encode(torch.zeros(5))
        held, value = implementation(fixed, held, torch.tensor([0.0, increment, 0, 0, 0]), 1, torch.float32)
        assert value.isnan().tolist() == [False, True, False, False, False]
        for sign in (1, -1, 1):
            held, value = implementation(fixed, held, torch.full((5,), sign * 0.25), sign, torch.float32)
            assert value.isnan().tolist() == [False, True, False, False, False]


def test_each_addition_rounds_by_half_a_unit_at_most() -> None:
    fixed = Fixed(16)
    x, increment = torch.randn(2, 1000, dtype=torch.float64).unbind()
    held = fixed.encode(x)
    _, value = fixed.add(held, increment, torch.float64)
    assert (value - (fixed.decode(held, torch.float64) + increment)).abs().max() <= 2.0**-17


def test_the_default_keeps_small_outputs_and_a_wide_range() -> None:
    for fixed in (Fixed(), Fixed(16)):
        assert fixed.limit >= 30_000
        assert fixed.fraction_bits >= 16
    for size in (1e-4, 1e-6):
        increment = torch.randn(1000, dtype=torch.float64) * size
        _, value = Fixed().add(Fixed().encode(torch.zeros(1000)), increment, torch.float64)
        assert (value - increment).abs().max() < 1e-5 * size
    # bfloat16 and float32 outputs of the usual sizes are added without any rounding.
    for dtype, size in ((torch.bfloat16, 2.0**-33), (torch.float32, 2.0**-17)):
        increment = (size * (1 + torch.rand(1000))).to(dtype)
        _, value = Fixed().add(Fixed().encode(torch.zeros(1000)), increment, torch.float64)
        assert value.equal(increment.double())


def layouts(width: int = 6) -> dict[str, tuple[Tensor, Tensor]]:
    """Return pairs of float tensors: what is encoded, and the increment."""
    image = torch.randn(2, width, 5, 7)
    wide = torch.randn(3, 4, 2 * width)
    return {
        "contiguous": (torch.randn(3, 4, width), torch.randn(3, 4, width)),
        "channels-last": (image.to(memory_format=torch.channels_last), image * 2),
        "channels-last-increment": (image, (image * 2).to(memory_format=torch.channels_last)),
        "chunk": (wide.chunk(2, -1)[1], wide.chunk(2, -1)[0]),
        "transposed": (torch.randn(4, 3, width).transpose(0, 1), torch.randn(3, 4, width)),
        "expanded-increment": (torch.randn(3, 4, width), torch.randn(3, 1, width).expand(3, 4, width)),
        "expanded-both": (torch.randn(1, 4, width).expand(3, 4, width), torch.randn(width).expand(3, 4, width)),
        "broadcast": (torch.randn(3, 4, width), torch.randn(width)),
        "strided": (torch.randn(3, 4, 2 * width)[..., ::2], torch.randn(3, 4, 3 * width)[..., ::3]),
        "offset": (torch.randn(3 * 4 * width + 1)[1:].view(3, 4, width), torch.randn(3, 4, width)),
        "odd-stride-of-one": (torch.randn(width).as_strided((1, width), (77, 1)), torch.randn(1, width)),
        "negated": (torch.randn(3, width), torch.randn(3, width, dtype=torch.complex64).conj().imag),
        "empty": (torch.randn(0, width), torch.randn(0, width)),
        "scalar": (torch.randn(()), torch.randn(())),
    }


def strides(x: Tensor) -> tuple[int, ...]:
    return tuple(stride for stride, size in zip(x.stride(), x.shape, strict=True) if size != 1)


@pytest.mark.parametrize("layout", layouts())
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_layouts(layout: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fixed, dtype = Fixed(), torch.bfloat16
    x, increment = (tensor.to(device) for tensor in layouts()[layout])
    held = fixed.encode(x)
    plain = fixed.encode(x.contiguous()).cpu(), increment.resolve_neg().contiguous().cpu()
    assert held.cpu().equal(plain[0])
    assert strides(held) == strides(x + 1)
    new, value = fixed.add(held, increment, dtype)
    back, before = fixed.subtract(new, increment, dtype)
    wanted, wanted_value = fixed.add(*plain, dtype)
    assert new.cpu().equal(wanted)
    assert value.cpu().equal(wanted_value)
    assert back.equal(held)
    assert before.equal(fixed.decode(held, dtype))
    # The strides of an elementwise operation on held, in every implementation: a replayed branch must see the same.
    assert {strides(t) for t in (new, value, back, before, fixed.decode(held, dtype))} == {strides(held + 1)}
    monkeypatch.setattr(_streams, "_fusible", lambda *tensors: False)
    again, value_again = fixed.add(held, increment, dtype)
    assert strides(again) == strides(value_again) == strides(new)
    assert again.equal(new)
    # A stream may also be held in a layout with gaps.
    gaps = torch.empty(*held.shape, 2, dtype=held.dtype, device=device)[..., 0].copy_(held)
    assert fixed.add(gaps, increment, dtype)[0].cpu().equal(wanted)


def test_arguments_are_checked() -> None:
    with pytest.raises(TypeError, match=r"Fixed\(fraction_bits=16.5\): expected an integer"):
        Fixed(16.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"expected torch\.int32 or torch\.int64"):
        Fixed(8, torch.int16)
    with pytest.raises(ValueError, match="expected 0 to 31 fraction bits"):
        Fixed(32, torch.int32)
    with pytest.raises(ValueError, match="expected 0 to 62 fraction bits"):
        Fixed(-1, torch.int64)


def test_formats_are_plain_values() -> None:
    assert repr(Float()) == "Float()"
    assert repr(Fixed(16)) == "Fixed(fraction_bits=16, dtype=torch.int32)"
    assert Fixed(17).dtype == torch.int64
    assert Fixed(8, torch.int64).dtype == torch.int64
    assert pickle.loads(pickle.dumps(Fixed(16))) == Fixed(16)
    assert hash(Fixed(16)) == hash(Fixed(16, torch.int32))


@every_format
def test_limit_is_the_largest_float64_that_fits(fixed: Fixed) -> None:
    beyond = 2.0 ** (RANGE_BITS[fixed.dtype] - fixed.fraction_bits)
    fits, wraps = fixed.encode(torch.tensor([fixed.limit, beyond], dtype=torch.float64)).tolist()
    assert Fraction(fits, 2**fixed.fraction_bits) == Fraction(fixed.limit)
    assert wraps == torch.iinfo(fixed.dtype).min
    assert quantised(math.nextafter(fixed.limit, math.inf), fixed) in (None, fits)


@given(magnitude=st.floats(0, 1e25), dtype=st.sampled_from([torch.int32, torch.int64]))
def test_fitting_fraction_bits(magnitude: float, dtype: torch.dtype) -> None:
    bits = fitting_fraction_bits(magnitude, dtype)
    fits = [k for k in range(RANGE_BITS[dtype] + 1) if quantised(magnitude, Fixed(k, dtype)) is not None]
    assert bits == max(fits, default=None)


def test_no_fraction_bits_fit_infinity() -> None:
    assert fitting_fraction_bits(math.inf, torch.int64) is None
    assert fitting_fraction_bits(math.nan, torch.int32) is None


# Gradients


def streams(fixed: Fixed, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    value, held = fixed_encode(torch.randn(3, 4, dtype=dtype), fixed)
    return value.requires_grad_(), held, torch.randn(3, 4, dtype=dtype).requires_grad_()


def test_gradients_pass_straight_through() -> None:
    fixed = Fixed()
    value, held, _ = streams(fixed, torch.float32)
    increment = torch.randn(3, 4, dtype=torch.bfloat16, requires_grad=True)
    new_value, new_held = fixed_add(value, held, increment, fixed)
    assert new_value.dtype == torch.float32
    assert not new_held.requires_grad
    weight = torch.randn(3, 4)
    new_value.backward(weight)
    assert value.grad is not None
    assert value.grad.equal(weight)
    assert increment.grad is not None
    assert increment.grad.dtype == torch.bfloat16
    assert increment.grad.equal(weight.bfloat16())


def test_gradients_of_a_broadcast_increment_are_summed() -> None:
    fixed = Fixed()
    value, held, _ = streams(fixed)
    bias = torch.randn(4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 4, dtype=torch.float64)
    fixed_add(value, held, bias, fixed)[0].backward(weight)
    assert bias.grad is not None
    torch.testing.assert_close(bias.grad, weight.sum(0))


def test_double_backward() -> None:
    fixed = Fixed()
    x, _, increment = streams(fixed)

    def exact(x: Tensor, increment: Tensor) -> Tensor:
        value, held = fixed_encode(x, fixed)
        return fixed_add(value, held, increment.sin(), fixed)[0] ** 2

    def smooth(x: Tensor, increment: Tensor) -> Tensor:
        return (x + increment.sin()) ** 2

    # The function is a staircase whose steps are far smaller than the differences that gradgradcheck takes.
    assert torch.autograd.gradcheck(exact, (x, increment), eps=1e-4, atol=1e-4)
    assert torch.autograd.gradgradcheck(exact, (x, increment), eps=1e-4, atol=1e-4)
    for order in (1, 2):
        grads = [derivative(f, order, x, increment) for f in (exact, smooth)]
        torch.testing.assert_close(grads[0], grads[1], atol=1e-9, rtol=1e-9)


def derivative(f: Any, order: int, *inputs: Tensor) -> tuple[Tensor, ...]:
    total = f(*inputs).sum()
    for _ in range(order):
        grads = torch.autograd.grad(total, inputs, create_graph=True)
        total = sum(grad.pow(2).sum() for grad in grads)
    return grads


def test_nothing_is_saved() -> None:
    saved: list[Tensor] = []
    fixed = Fixed()
    x = torch.randn(3, 4, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda _: None):
        value, held = fixed_encode(x, fixed)
        fixed_add(value, held, x, fixed)
    assert saved == []


def test_encoding_passes_gradients_on() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    value, held = fixed_encode(x, Fixed(16))
    weight = torch.randn(3, 4)
    assert torch.autograd.grad(value, x, weight)[0].equal(weight)
    assert not held.requires_grad
    assert value.equal(Fixed(16).decode(held, torch.float32))


# Transforms, compilers, tracers


@pytest.mark.parametrize("in_dims", [(0, 0, 0), (1, None, 2), (None, 0, None)])
def test_vmap(in_dims: tuple[int | None, ...]) -> None:
    fixed, monitor = Fixed(16), RangeMonitor()
    single = torch.randn(4, 5), fixed.encode(torch.randn(4, 5)), torch.randn(4, 5)
    stacked = [
        x if dim is None else torch.stack([x, x + 1, x + 2], dim) for x, dim in zip(single, in_dims, strict=True)
    ]
    columns = [x.expand(3, 4, 5) if dim is None else x.movedim(dim, 0) for x, dim in zip(stacked, in_dims, strict=True)]
    value, held = torch.vmap(lambda *args: fixed_add(*args, fixed, monitor, 4), in_dims)(*stacked)
    wanted_value, wanted_held = fixed_add(columns[0], columns[1].contiguous(), columns[2], fixed)
    assert held.equal(wanted_held)
    assert value.equal(wanted_value)
    assert monitor.check() is None
    stacked[2][..., 0] = math.inf
    torch.vmap(lambda *args: fixed_add(*args, fixed, monitor, 4), in_dims)(*stacked)
    assert monitor.check() == (4, math.inf)


def test_vmap_of_the_plain_functions() -> None:
    fixed, monitor = Fixed(), RangeMonitor()
    x, increment = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    increment[1, 0, 0] = math.inf
    held = torch.vmap(lambda x: fixed.encode(x, monitor))(x)
    assert held.equal(fixed.encode(x))
    got = torch.vmap(lambda held, increment: fixed.add(held, increment, torch.float32, monitor, 2))(held, increment)
    wanted = fixed.add(held, increment, torch.float32)
    assert same(got[0], wanted[0])
    assert same(got[1], wanted[1])
    assert monitor.poll() == (2, math.inf)


def test_function_transforms() -> None:
    fixed = Fixed()

    def loss(x: Tensor, increment: Tensor) -> Tensor:
        value, held = fixed_encode(x, fixed)
        return (fixed_add(value, held, increment, fixed)[0] ** 2).sum()

    x, increment = torch.randn(2, 3, 4)
    wanted = 2 * (x + increment)
    got = torch.func.grad(loss, argnums=(0, 1))(x, increment)
    torch.testing.assert_close(got, (wanted, wanted))
    per_sample = torch.vmap(torch.func.grad(loss), in_dims=(0, None))(x, increment[0])
    torch.testing.assert_close(per_sample, 2 * (x + increment[0]))
    second = torch.func.jacrev(torch.func.grad(lambda x: loss(x, increment)))(x)
    torch.testing.assert_close(second.reshape(12, 12), 2 * torch.eye(12))


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("increment_dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("fixed", [Fixed(16), Fixed()], ids=["int32", "int64"])
def test_compiled(fixed: Fixed, increment_dtype: torch.dtype, device: str) -> None:
    torch._dynamo.reset()
    monitor = RangeMonitor()
    monitor.prepare(torch.device(device, 0) if device == "cuda" else torch.device(device))

    @torch.compile(fullgraph=True)
    def forward(held: Tensor, factor: Tensor, increment: Tensor) -> tuple[Tensor, Tensor]:
        # The product is fused with the addition: it must be rounded to its dtype all the same.
        return fixed.add(held, factor * increment, increment_dtype, monitor, 7)

    @torch.compile(fullgraph=True)
    def backward(held: Tensor, increment: Tensor) -> tuple[Tensor, Tensor]:
        return fixed.subtract(held, increment, increment_dtype)

    held, increment = (x.to(device) for x in edges(fixed, increment_dtype))
    factor = torch.where(increment.isfinite() & (increment.abs() < 1e3), torch.randn_like(increment), 1)
    wanted = fixed.add(held, factor * increment, increment_dtype)
    got = forward(held, factor, increment)
    assert same(got[0], wanted[0])
    assert same(got[1], wanted[1])
    back = backward(got[0], factor * increment)
    before = fixed.subtract(got[0], factor * increment, increment_dtype)
    assert same(back[0], before[0])
    assert same(back[1], before[1])
    found = monitor.check()
    assert found is not None
    assert found.step == 7
    assert math.isnan(found.magnitude)


@pytest.mark.slow
def test_compiled_function_with_gradients() -> None:
    torch._dynamo.reset()
    fixed, monitor = Fixed(), RangeMonitor()

    def loss(x: Tensor, increment: Tensor) -> tuple[Tensor, Tensor]:
        value, held = fixed_encode(x, fixed, monitor)
        value, held = fixed_add(value, held, increment.sin(), fixed, monitor, 3)
        return (value**2).sum(), held

    x, increment = torch.randn(2, 5, 6).unbind()
    inputs = x.requires_grad_(), increment.requires_grad_()
    total, held = torch.compile(loss, fullgraph=True)(*inputs)
    grads = torch.autograd.grad(total, inputs)
    wanted_total, wanted_held = loss(*inputs)
    assert (held - wanted_held).abs().max() <= 2**18  # sin is not the same to the last bit
    torch.testing.assert_close(grads, torch.autograd.grad(wanted_total, inputs))


def test_fake_tensors_and_tracing() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    fixed, monitor = Fixed(), RangeMonitor()
    with FakeTensorMode():
        held = fixed.encode(torch.empty(3, 4), monitor)
        new, value = fixed.add(held, torch.empty(3, 4, dtype=torch.bfloat16), torch.bfloat16, monitor, 1)
        assert (new.shape, new.dtype, value.dtype) == ((3, 4), torch.int64, torch.bfloat16)
    held, increment = fixed.encode(torch.randn(3, 4)), torch.randn(3, 4)
    graph = make_fx(lambda held, increment: fixed.add(held, increment, torch.float32))(held, increment)
    increment[0, 0] = math.inf
    assert same(graph(held, increment)[1], fixed.add(held, increment, torch.float32)[1])


@pytest.mark.slow
def test_export() -> None:
    class Add(torch.nn.Module):
        def forward(self, held: Tensor, increment: Tensor) -> tuple[Tensor, Tensor]:
            return Fixed().add(held, increment, torch.float32)

    held, increment = Fixed().encode(torch.randn(3, 4)), torch.randn(3, 4)
    exported = torch.export.export(Add(), (held, increment)).module()
    increment[0, 0] = math.inf
    assert same(exported(held, increment)[1], Fixed().add(held, increment, torch.float32)[1])


# The monitor


def test_findings_agree_between_implementations(implementation: Any) -> None:
    for fixed in FORMATS:
        monitor, quiet = RangeMonitor(), RangeMonitor()
        top = 2 ** RANGE_BITS[fixed.dtype] - 1
        held = torch.tensor([0, top, -top // 2, torch.iinfo(fixed.dtype).min], dtype=fixed.dtype)
        fine = torch.tensor([0.25, 0, -0.25, 0.5]) * fixed.limit
        implementation(fixed, held, fine, 1, torch.float32, quiet, 0)
        assert quiet.check() is None
        beyond = torch.tensor([0.25, 0.5, -0.75, math.nan]) * fixed.limit
        implementation(fixed, held, beyond, 1, torch.float32, monitor, 5)
        found = monitor.check()
        assert found is not None
        # The sentinel is old news; of the two sums, 1.5 and -1.25 limits, the larger counts.
        assert found.step == 5
        assert found.magnitude == pytest.approx(1.5 * fixed.limit, rel=1e-6)


def test_the_first_step_and_its_largest_magnitude_are_reported() -> None:
    fixed, monitor = Fixed(16), RangeMonitor()
    held = fixed.encode(torch.zeros(3), monitor)
    assert monitor.poll() is None
    for step, sizes in ((6, [1, math.nan, 1]), (4, [1, 1, 40_000]), (4, [1, 50_000, 1]), (5, [math.inf, 1, 1])):
        fixed.add(held, torch.tensor(sizes, dtype=torch.float32), torch.float32, monitor, step)
    monitor.flush()
    assert monitor.poll() == monitor.check() == (4, 50_000)
    fixed.encode(torch.tensor([-math.inf]), monitor)
    assert monitor.check() == (-1, math.inf)
    monitor.reset()
    assert monitor.poll() is None
    fixed.add(held, torch.tensor([1, math.nan, 1]), torch.float32, monitor, 1)
    found = monitor.poll()
    assert found is not None
    assert found.step == 1
    assert math.isnan(found.magnitude)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
def test_copies_of_a_monitor_start_empty(copied: Any) -> None:
    monitor = RangeMonitor()
    Fixed().encode(torch.tensor([math.nan]), monitor)
    other = copied(monitor)
    assert other.check() is None
    Fixed().add(torch.zeros(1, dtype=torch.int64), torch.tensor([math.inf]), torch.float32, other, 3)
    assert other.check() == (3, math.inf)
    found = monitor.check()
    assert found is not None
    assert found.step == -1


def test_a_monitor_first_used_in_inference_serves_training() -> None:
    monitor = RangeMonitor()
    held = Fixed().encode(torch.zeros(2))
    with torch.inference_mode():
        Fixed().add(held, torch.tensor([1.0, math.inf]), torch.float32, monitor, 5)
    Fixed().add(held, torch.tensor([1.0, math.inf]), torch.float32, monitor, 2)
    assert monitor.check() == (2, math.inf)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_vanishing_outputs_are_counted(device: str) -> None:
    fixed, monitor = Fixed(16), RangeMonitor()
    held = fixed.encode(torch.zeros(8, 40_000, device=device))
    few = torch.where(torch.rand(8, 40_000, device=device) < 0.25, 1e-6, 1e-2)
    most = torch.where(torch.rand(8, 40_000, device=device) < 0.75, 1e-6, 1e-2)
    zeros = torch.zeros(8, 40_000, device=device)
    for step, increment in enumerate((few, most, zeros)):
        fixed.add(held, increment, torch.float32, monitor, step)
    monitor.check()
    news = monitor.vanishing()
    assert list(news) == [1]
    assert 0.7 < news[1] < 0.8
    assert monitor.vanishing() == {}
    # Only some of the later calls are looked at, here the second and the fourth.
    for call in range(2, 6):
        fixed.add(held, most if call in (3, 5) else few, torch.float32, monitor, 0)
    monitor.check()
    assert monitor.vanishing() == {}


# Checksums


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float64, torch.float32, torch.bfloat16, torch.bool])
def test_checksum_sees_every_change(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    x = (torch.randn(3, 50) * 1000).to(dtype)
    total = checksum(x)
    assert (total.dtype, total.shape) == (torch.int64, ())
    assert total == checksum(x.clone())
    assert total == checksum(x.t().contiguous().t())
    seen = {int(total)}
    for i in range(x.numel()):
        changed = x.clone().reshape(-1)
        unsigned = changed.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])
        unsigned[i] ^= 1
        seen.add(int(checksum(changed)))
    assert len(seen) == x.numel() + 1
    monkeypatch.setattr(_streams, "_PIECE_OF_CHECKSUM", 16)
    assert total == checksum(x)


def test_checksum_sees_places() -> None:
    x = torch.arange(20, dtype=torch.int64)
    totals = {int(checksum(x))}
    for i, j in itertools.combinations(range(20), 2):
        swapped = x.clone()
        swapped[i], swapped[j] = x[j], x[i]
        totals.add(int(checksum(swapped)))
    assert len(totals) == 191
    assert int(checksum(torch.zeros(3))) != int(checksum(torch.zeros(4)))
    assert int(checksum(torch.zeros(3))) != int(checksum(-torch.zeros(3)))


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=6))
def test_checksum_is_the_sum_of_mixed_elements(elements: list[int]) -> None:
    total = 0
    for i, element in enumerate(elements):
        z = (element + (i + 1) * 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        total = (total + (z ^ z >> 31)) % 2**64
    assert int(checksum(torch.tensor(elements))) % 2**64 == total


# CUDA


@pytest.mark.gpu
@every_value
@every_increment
@every_format
@pytest.mark.parametrize("size", [1 << 20, 999_983])
def test_cuda_equals_cpu(fixed: Fixed, increment_dtype: torch.dtype, value_dtype: torch.dtype, size: int) -> None:
    need_kernel()
    x = torch.randn(size + 1) * fixed.limit / 8
    increment = (torch.randn(size + 1) * torch.logspace(-12, 1, size + 1) * fixed.limit).to(increment_dtype)
    for start in (0, 1):  # memory that does and does not allow 16-byte accesses
        held, addend = fixed.encode(x)[start : start + size], increment[start : start + size]
        there = fixed.encode(x.cuda())[start : start + size], increment.cuda()[start : start + size]
        wanted = fixed.add(held, addend, value_dtype)
        got = fixed.add(*there, value_dtype)
        back = fixed.subtract(got[0], there[1], value_dtype)
        wanted_back = fixed.subtract(wanted[0], addend, value_dtype)
        for a, b in zip((*got, *back), (*wanted, *wanted_back), strict=True):
            assert same(a.cpu(), b)
        assert checksum(got[0]).cpu() == checksum(wanted[0])


@pytest.mark.gpu
def test_cuda_without_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    need_kernel()
    from revnet import _kernels

    held, increment = (x.cuda() for x in edges(Fixed(), torch.bfloat16))
    wanted = Fixed().add(held, increment, torch.bfloat16)
    monkeypatch.setitem(_kernels._state, "broken", True)
    got = Fixed().add(held, increment, torch.bfloat16)
    assert same(got[0], wanted[0])
    assert same(got[1], wanted[1])
    assert Fixed().encode(increment).equal(Fixed().encode(increment.cpu()).cuda())


@pytest.mark.gpu
def test_nothing_synchronises() -> None:
    need_kernel()
    fixed, monitor = Fixed(), RangeMonitor()
    x = torch.randn(64, 64, device="cuda", requires_grad=True)
    bad = torch.full((64, 64), math.inf, device="cuda")
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        value, held = fixed_encode(x, fixed, monitor)
        value, held = fixed_add(value, held, x, fixed, monitor, 0)
        value.sum().backward()
        held, _ = fixed.subtract(held, x.detach(), torch.float32)
        fixed.add(held, bad, torch.float32, monitor, 3)
        monitor.flush()
        monitor.poll()
        monitor.vanishing()
        total = checksum(held)
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    torch.cuda.synchronize()
    assert monitor.poll() == (3, math.inf)
    assert total == checksum(held.cpu()).cuda()


@pytest.mark.gpu
def test_cuda_graph() -> None:
    need_kernel()
    fixed, monitor = Fixed(), RangeMonitor()
    held = fixed.encode(torch.randn(64, 64, device="cuda"))
    increment = torch.randn(64, 64, device="cuda")

    def step() -> tuple[Tensor, Tensor]:
        result = fixed.add(held, increment, torch.bfloat16, monitor, 9)
        monitor.flush()
        return result

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        new, value = step()
    increment.copy_(torch.randn(64, 64, device="cuda"))
    graph.replay()
    torch.cuda.synchronize()
    wanted = fixed.add(held, increment, torch.bfloat16)
    assert same(new, wanted[0])
    assert same(value, wanted[1])
    assert monitor.poll() is None
    increment[3, 4] = -math.inf
    graph.replay()
    torch.cuda.synchronize()
    assert value[3, 4].isnan()
    assert monitor.poll() == (9, math.inf)


@pytest.mark.gpu
def test_a_first_call_in_a_capture_is_refused() -> None:
    need_kernel()
    held, monitor = Fixed().encode(torch.randn(8, device="cuda")), RangeMonitor()
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="run the sequence once before capturing"), torch.cuda.graph(graph):
        Fixed().add(held, torch.ones(8, device="cuda"), torch.float32, monitor, 0)
