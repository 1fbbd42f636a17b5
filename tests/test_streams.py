"""Fixed-point streams: the arithmetic against Python integers, and every implementation against the
reference.
"""

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
import torch.autograd.forward_ad as forward_ad
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import _pytree as pytree

from revnet._factors import DENOMINATOR, NUMERATORS, Factor, Increment, factor_of
from revnet._streams import buffer as buffers
from revnet._streams import checksum as checksums
from revnet._streams import cpu, scaled
from revnet._streams import fixed as dispatch
from revnet._streams import reference as plain_torch
from revnet._streams.autograd import fixed_add, fixed_encode, save_product
from revnet._streams.buffer import BufferedStream
from revnet._streams.checksum import checksum
from revnet._streams.fixed import Fixed, fitting_fraction_bits
from revnet._streams.format import Encoded, Float
from revnet._streams.monitor import RangeMonitor, key_of

# Raised inside torch: by a module that its compiler imports, and by the compiler where it traces a
# Function.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning"),
]

FORMATS = [Fixed(), Fixed(16), Fixed(0), Fixed(37)]
FORMAT_IDS = [str(fixed.fraction_bits) for fixed in FORMATS]
FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
FLOAT_IDS = [str(dtype)[6:] for dtype in FLOATS]

every_format = pytest.mark.parametrize("fixed", FORMATS, ids=FORMAT_IDS)
every_increment = pytest.mark.parametrize("increment_dtype", FLOATS, ids=FLOAT_IDS)
every_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=FLOAT_IDS)

# Without CUDA, Triton's interpreter runs the kernel: TRITON_INTERPRET=1 pytest -k "kernel and not
# bfloat16" (it truncates to bfloat16 where a device rounds) -W ignore::RuntimeWarning (NumPy's, for
# overflows that are meant).
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and not torch.cuda.is_available()
DEVICE = "cpu" if INTERPRETED else "cuda"
ON_KERNEL = pytest.param("kernel", marks=() if INTERPRETED else pytest.mark.gpu)


@pytest.fixture(params=["reference", "cpu", "cpu-pieces", ON_KERNEL])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return combine(fixed, held, increment, sign, monitor, step) -> held, on CPU tensors; held
    None encodes.
    """
    if request.param == "kernel":
        need_kernel()
        return combine_kernel
    if request.param == "cpu-pieces":
        monkeypatch.setattr(cpu, "_PIECE", 3)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    return reference if request.param == "reference" else combine


def combine(
    fixed: Fixed,
    held: Encoded | None,
    increment: Tensor,
    sign: int,
    monitor: RangeMonitor | None = None,
    step: int = 0,
) -> Encoded:
    return fixed._combine(held, increment, sign, monitor, step)


def reference(
    fixed: Fixed,
    held: Encoded | None,
    increment: Tensor,
    sign: int,
    monitor: RangeMonitor | None = None,
    step: int = 0,
) -> Encoded:
    return plain_torch.combine(held, increment, sign, fixed.fraction_bits, monitor, step)


def combine_kernel(
    fixed: Fixed,
    held: Encoded | None,
    increment: Tensor,
    sign: int,
    monitor: RangeMonitor | None = None,
    step: int = 0,
) -> Encoded:
    pattern = increment if held is None else held.value
    residual = torch.empty_like(pattern, dtype=fixed.residual_dtype(pattern.dtype), device=DEVICE)
    new = Encoded(torch.empty_like(pattern, device=DEVICE), residual)
    there = None if held is None else Encoded(*(part.to(DEVICE) for part in held))
    assert dispatch.launched(
        there, increment.to(DEVICE), new, sign, fixed.fraction_bits, monitor, step
    )
    return Encoded(*(part.cpu() for part in new))


def need_cuda() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


def need_kernel() -> None:
    if not INTERPRETED:
        need_cuda()
    pytest.importorskip("triton")


def bound(fixed: Fixed, dtype: torch.dtype) -> int:
    """Return the first integer out of range."""
    limit = 2 ** max(39, fixed.fraction_bits + 15)
    return min(limit, 65504 * 2**fixed.fraction_bits) if dtype == torch.float16 else limit


def combined(
    held: int | None, increment: float, sign: int, fixed: Fixed, dtype: torch.dtype
) -> int | None:
    """Return the new integer, None where there is none."""
    if held is None or not math.isfinite(increment):
        return None
    total = held + sign * round(Fraction(increment) * 2**fixed.fraction_bits)
    return total if abs(total) < bound(fixed, dtype) else None


def read(integer: int | None, fixed: Fixed, dtype: torch.dtype) -> float:
    """Return the value of an integer: rounded to float32 (float64), and from there to a 16-bit
    type.
    """
    if integer is None:
        return math.nan
    if dtype == torch.float64:
        return math.ldexp(float(integer), -fixed.fraction_bits)
    value = math.ldexp(to_significant(integer, 24), -fixed.fraction_bits)
    if dtype == torch.bfloat16:
        mantissa, exponent = math.frexp(value)
        return math.ldexp(to_significant(int(math.ldexp(mantissa, 24)), 8), exponent - 24)
    with np.errstate(over="ignore"):
        return float(np.float16(value)) if dtype == torch.float16 else value


def to_significant(number: int, bits: int) -> int:
    """Round an integer to so many significant bits, ties to even."""
    excess = max(0, abs(number).bit_length() - bits)
    return round(Fraction(number, 2**excess)) * 2**excess


def held_of(integers: list[int | None], fixed: Fixed, dtype: torch.dtype) -> Encoded:
    """Return the stream of these integers, None for what is not a number."""
    values = [read(integer, fixed, dtype) for integer in integers]
    rests = [
        0 if integer is None else integer - int(Fraction(value) * 2**fixed.fraction_bits)
        for integer, value in zip(integers, values, strict=True)
    ]
    width = {torch.bfloat16: torch.int32, torch.float16: torch.int32}.get(dtype, torch.int16)
    if fixed.fraction_bits > 24:
        width = {torch.int16: torch.int32, torch.int32: torch.int64}[width]
    return Encoded(
        torch.tensor(values, dtype=torch.float64).to(dtype), torch.tensor(rests, dtype=width)
    )


def interesting_integers(fixed: Fixed, dtype: torch.dtype) -> list[int | None]:
    top = bound(fixed, dtype) - 1
    middle = [
        0,
        1,
        2,
        12345,
        2**24 + 1,
        2**24 + 3,
        2**25 + 2,
        top // 2,
        top // 4,
        top // 4 + 1,
        top - 1,
        top,
    ]
    middle = [number for number in middle if number <= top]
    return [None, *middle, *(-number for number in middle)]


def interesting_floats(fixed: Fixed, dtype: torch.dtype) -> list[float]:
    unit, edge = 2.0**-fixed.fraction_bits, fixed.limit
    info = torch.finfo(dtype)
    one = torch.ones((), dtype=dtype)
    below = torch.nextafter(one * edge, one * 0).item() if edge < info.max else info.max
    wanted = [
        0.0,
        info.smallest_normal,
        info.smallest_normal * info.eps,
        info.max,
        math.inf,
        below,
        edge,
        1.0,
        1 / 3,
    ]
    wanted += [
        unit * factor
        for factor in (0.5, 0.5 - 2**-10, 0.5 + 2**-7, 1, 1.5, 2.5, 3.5, 12344.5, 2**22 + 0.5)
    ]
    wanted += [edge / 4, edge / 2, edge * 0.75]
    rounded = torch.tensor(wanted, dtype=torch.float64).to(dtype).tolist()
    return [math.nan, *rounded, *(-value for value in rounded)]


def bits(x: Tensor) -> Tensor:
    """Return x's bits as integers; all NaN have the same."""
    if x.is_floating_point():
        x = torch.where(x.isnan(), math.nan, x)
    return x.contiguous().view(-1).view(torch.uint8)


def same(a: Encoded, b: Encoded) -> bool:
    return all(
        x.dtype == y.dtype and x.stride() == y.stride() and bits(x).equal(bits(y))
        for x, y in zip(a, b, strict=True)
    )


@cache
def edges(
    fixed: Fixed, increment_dtype: torch.dtype, dtype: torch.dtype
) -> tuple[list[int | None], Tensor]:
    """Return every pair of an interesting integer and an interesting increment."""
    integers = interesting_integers(fixed, dtype)
    integers, increments = zip(
        *itertools.product(integers, interesting_floats(fixed, increment_dtype)), strict=True
    )
    return list(integers), torch.tensor(increments, dtype=torch.float64).to(increment_dtype)


@cache
def combined_edges(
    fixed: Fixed, increment_dtype: torch.dtype, dtype: torch.dtype, sign: int
) -> list[int | None]:
    integers, increments = edges(fixed, increment_dtype, dtype)
    return [
        combined(*pair, sign, fixed, dtype)
        for pair in zip(integers, increments.tolist(), strict=True)
    ]


@every_dtype
@every_increment
@every_format
def test_combine_at_the_edges(
    implementation: Any, fixed: Fixed, increment_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    integers, increment = edges(fixed, increment_dtype, dtype)
    held = held_of(integers, fixed, dtype)
    for sign in (1, -1):
        new = implementation(fixed, held, increment, sign)
        assert same(new, held_of(combined_edges(fixed, increment_dtype, dtype, sign), fixed, dtype))


@every_dtype
@every_format
def test_encode_at_the_edges(implementation: Any, fixed: Fixed, dtype: torch.dtype) -> None:
    x = torch.tensor(interesting_floats(fixed, dtype), dtype=torch.float64).to(dtype)
    wanted = [combined(0, value, 1, fixed, dtype) for value in x.tolist()]
    assert same(implementation(fixed, None, x, 1), held_of(wanted, fixed, dtype))


@every_dtype
@every_format
def test_integers_and_back(fixed: Fixed, dtype: torch.dtype) -> None:
    integers = interesting_integers(fixed, dtype)
    held = held_of(integers, fixed, dtype)
    counts, known = fixed.counts(held)
    assert known.tolist() == [integer is not None for integer in integers]
    assert counts.tolist() == [integer or 0 for integer in integers]
    assert same(fixed.held(counts, known, dtype), held)


@given(
    data=st.data(),
    fixed=st.sampled_from(FORMATS),
    increment_dtype=st.sampled_from(FLOATS),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.float16]),
)
def test_combine_of_anything(
    implementation: Any,
    data: st.DataObject,
    fixed: Fixed,
    increment_dtype: torch.dtype,
    dtype: torch.dtype,
) -> None:
    top = bound(fixed, dtype) - 1
    near = st.integers(-(2**40), 2**40).map(lambda halves: halves * fixed.unit / 2)
    number = st.one_of(
        st.floats(),
        st.floats(width=16),
        near,
        st.integers(-top, top).map(lambda count: count * fixed.unit),
    )
    pair = st.tuples(st.integers(-top, top), number)
    integers, numbers = zip(*data.draw(st.lists(pair, min_size=1, max_size=9)), strict=True)
    increment = torch.tensor(numbers, dtype=torch.float64).to(increment_dtype)
    wanted = [
        combined(*pair, 1, fixed, dtype) for pair in zip(integers, increment.tolist(), strict=True)
    ]
    new = implementation(fixed, held_of(list(integers), fixed, dtype), increment, 1)
    assert same(new, held_of(wanted, fixed, dtype))
    expected = [old if new is not None else None for old, new in zip(integers, wanted, strict=True)]
    assert same(implementation(fixed, new, increment, -1), held_of(expected, fixed, dtype))


@every_dtype
@every_increment
@every_format
def test_subtracting_undoes_a_long_sum(
    implementation: Any, fixed: Fixed, increment_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    spread = min(fixed.limit / 64, 3000.0)  # float16 ends at 65504
    start = held = fixed.encode((torch.randn(4, 131, dtype=torch.float64) * spread / 8).to(dtype))
    increments = [(torch.randn(4, 131) * spread * 0.1**i).to(increment_dtype) for i in range(8)]
    for increment in increments:
        held = implementation(fixed, held, increment, 1)
    for increment in reversed(increments):
        held = implementation(fixed, held, increment, -1)
    assert same(held, start)


@pytest.mark.parametrize("increment", [math.nan, math.inf, -math.inf, 3e38])
def test_what_left_the_range_stays_not_a_number(implementation: Any, increment: float) -> None:
    for fixed in FORMATS:
        held = fixed.encode(torch.zeros(5))
        held = implementation(fixed, held, torch.tensor([0.0, increment, 0, 0, 0]), 1)
        assert held.value.isnan().tolist() == [False, True, False, False, False]
        for sign in (1, -1, 1):
            held = implementation(fixed, held, torch.full((5,), sign * 0.25), sign)
            assert held.value.isnan().tolist() == [False, True, False, False, False]


def test_each_addition_rounds_by_half_a_unit_at_most() -> None:
    fixed = Fixed(16)
    x, increment = torch.randn(2, 1000, dtype=torch.float64).unbind()
    held = fixed.encode(x)
    error = (fixed.add(held, increment).value - (held.value + increment)).abs().max()
    assert 2.0**-18 < error <= 2.0**-17


def test_the_default_keeps_small_outputs_and_a_wide_range() -> None:
    for fixed in (Fixed(), Fixed(16)):
        assert fixed.limit >= 30_000
        assert fixed.fraction_bits >= 16
    for size in (1e-4, 1e-6):
        increment = torch.randn(1000, dtype=torch.float64) * size
        value = Fixed().add(Fixed().encode(torch.zeros(1000, dtype=torch.float64)), increment).value
        assert (value - increment).abs().max() <= 2.0**-25
        # What float32 loses where the stream is around one.
        float32 = (torch.ones(1000) + increment.float()).double() - 1
        assert (value - increment).norm() < 1.1 * (float32 - increment).norm()
    # bfloat16 and float32 outputs of the usual sizes are added without any rounding.
    for dtype, size in ((torch.bfloat16, 2.0**-17), (torch.float32, 0.5)):
        increment = (size * (1 + torch.rand(1000))).to(dtype)
        assert (
            Fixed().add(Fixed().encode(torch.zeros(1000)), increment).value.equal(increment.float())
        )


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
        "expanded-increment": (
            torch.randn(3, 4, width),
            torch.randn(3, 1, width).expand(3, 4, width),
        ),
        "expanded-both": (
            torch.randn(1, 4, width).expand(3, 4, width),
            torch.randn(width).expand(3, 4, width),
        ),
        "broadcast": (torch.randn(3, 4, width), torch.randn(width)),
        "strided": (torch.randn(3, 4, 2 * width)[..., ::2], torch.randn(3, 4, 3 * width)[..., ::3]),
        "offset": (torch.randn(3 * 4 * width + 1)[1:].view(3, 4, width), torch.randn(3, 4, width)),
        "odd-stride-of-one": (
            torch.randn(width).as_strided((1, width), (77, 1)),
            torch.randn(1, width),
        ),
        "negated": (
            torch.randn(3, width),
            torch.randn(3, width, dtype=torch.complex64).conj().imag,
        ),
        "empty": (torch.randn(0, width), torch.randn(0, width)),
        "scalar": (torch.randn(()), torch.randn(())),
    }


def strides(x: Tensor) -> tuple[int, ...]:
    return tuple(stride for stride, size in zip(x.stride(), x.shape, strict=True) if size != 1)


def equal(a: Encoded, b: Encoded) -> bool:
    return all(x.cpu().equal(y.cpu()) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("layout", layouts())
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_layouts(layout: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fixed = Fixed()
    x, increment = (tensor.to(device) for tensor in layouts()[layout])
    x = x.bfloat16()
    held = fixed.encode(x)
    plain = fixed.encode(x.contiguous().cpu()), increment.resolve_neg().contiguous().cpu()
    assert equal(held, plain[0])
    assert strides(held.value) == strides(x + 1)
    new = fixed.add(held, increment)
    back = fixed.subtract(new, increment)
    assert equal(new, fixed.add(*plain))
    assert equal(back, held)
    # The strides of an elementwise operation on held, in every implementation: a replayed branch
    # must see the same.
    assert {strides(part) for part in (*new, *back, *held)} == {strides(held.value + 1)}
    monkeypatch.setattr(dispatch, "fusible", lambda *tensors: False)
    again = fixed.add(held, increment)
    assert {strides(part) for part in again} == {strides(new.value)}
    assert equal(again, new)
    # A stream may also be held in a layout with gaps.
    gaps = [
        torch.empty(*part.shape, 2, dtype=part.dtype, device=device)[..., 0].copy_(part)
        for part in held
    ]
    assert equal(fixed.add(Encoded(*gaps), increment), new)


def test_arguments_are_checked() -> None:
    with pytest.raises(TypeError, match=r"Fixed\(fraction_bits=16.5\): expected an integer"):
        Fixed(16.5)  # type: ignore[arg-type]
    for bits in (38, -1):
        with pytest.raises(ValueError, match="expected 0 to 37 fraction bits"):
            Fixed(bits)


def test_formats_are_plain_values() -> None:
    assert repr(Float()) == "Float()"
    assert repr(Fixed(16)) == "Fixed(fraction_bits=16)"
    assert pickle.loads(pickle.dumps(Fixed(16))) == Fixed(16)
    assert hash(Fixed(16)) == hash(Fixed(16))


@every_dtype
@every_format
def test_the_limit_is_the_first_number_that_does_not_fit(fixed: Fixed, dtype: torch.dtype) -> None:
    if dtype == torch.float16:
        assert fixed.limit_in(dtype) == min(fixed.limit, 65504)
    limit = torch.tensor(fixed.limit_in(dtype), dtype=dtype)
    below = torch.minimum(torch.nextafter(limit, limit * 0), limit - fixed.unit)
    x = torch.stack([below, limit, -limit])
    assert fixed.encode(x).value.isnan().tolist() == [False, True, True]
    assert fixed.encode(x).value[0] == x[0]


@given(magnitude=st.floats(0, 1e25))
def test_fitting_fraction_bits(magnitude: float) -> None:
    fits = [k for k in range(38) if combined(0, magnitude, 1, Fixed(k), torch.float64) is not None]
    bits = fitting_fraction_bits(magnitude)
    assert bits == max(fits, default=None) or (
        bits is not None and bits + 1 == max(fits) and math.log2(magnitude) > 14
    )


def test_no_fraction_bits_fit_infinity() -> None:
    assert fitting_fraction_bits(math.inf) is None
    assert fitting_fraction_bits(math.nan) is None


# Gradients


def streams(fixed: Fixed, dtype: torch.dtype = torch.float64) -> tuple[Encoded, Tensor]:
    value, residual = fixed_encode(torch.randn(3, 4, dtype=dtype), fixed)
    return Encoded(value.requires_grad_(), residual), torch.randn(
        3, 4, dtype=dtype
    ).requires_grad_()


def test_gradients_pass_straight_through() -> None:
    fixed = Fixed()
    held, _ = streams(fixed, torch.float32)
    increment = torch.randn(3, 4, dtype=torch.bfloat16, requires_grad=True)
    new = fixed_add(held, increment, fixed)
    assert new.value.dtype == torch.float32
    assert not new.residual.requires_grad
    weight = torch.randn(3, 4)
    new.value.backward(weight)
    assert held.value.grad is not None
    assert held.value.grad.equal(weight)
    assert increment.grad is not None
    assert increment.grad.dtype == torch.bfloat16
    assert increment.grad.equal(weight.bfloat16())


def test_gradients_of_a_broadcast_increment_are_summed() -> None:
    fixed = Fixed()
    bias = torch.randn(4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 4, dtype=torch.float64)
    fixed_add(streams(fixed)[0], bias, fixed).value.backward(weight)
    assert bias.grad is not None
    torch.testing.assert_close(bias.grad, weight.sum(0))


def test_double_backward() -> None:
    fixed = Fixed(37)
    (x, _), increment = streams(fixed)

    def exact(x: Tensor, increment: Tensor) -> Tensor:
        return fixed_add(fixed_encode(x, fixed), increment.sin(), fixed).value ** 2

    def smooth(x: Tensor, increment: Tensor) -> Tensor:
        return (x + increment.sin()) ** 2

    # The function is a staircase whose steps are far smaller than the differences that
    # gradgradcheck takes.
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
        fixed_add(fixed_encode(x, fixed), x, fixed)
    assert saved == []


def test_encoding_passes_gradients_on() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    held = fixed_encode(x, Fixed(16))
    weight = torch.randn(3, 4)
    assert torch.autograd.grad(held.value, x, weight)[0].equal(weight)
    assert not held.residual.requires_grad
    assert same(held, Fixed(16).encode(x.detach()))


# Transforms, compilers, tracers


def added(fixed: Fixed, *watch: Any) -> Any:
    """Return fixed_add of three tensors."""
    return lambda value, residual, increment: tuple(
        fixed_add(Encoded(value, residual), increment, fixed, *watch)
    )


@pytest.mark.parametrize("in_dims", [(0, 0, 0), (1, None, 2), (None, 0, None)])
def test_vmap(in_dims: tuple[int | None, ...]) -> None:
    fixed, monitor = Fixed(16), RangeMonitor()
    single = *fixed.encode(torch.randn(4, 5)), torch.randn(4, 5)
    stacked = [
        x if dim is None else torch.stack([x, x + 1, x + 2], dim)
        for x, dim in zip(single, in_dims, strict=True)
    ]
    columns = [
        x.expand(3, 4, 5) if dim is None else x.movedim(dim, 0)
        for x, dim in zip(stacked, in_dims, strict=True)
    ]
    wanted = fixed.add(Encoded(columns[0].contiguous(), columns[1].contiguous()), columns[2])
    assert equal(Encoded(*torch.vmap(added(fixed, monitor, 4), in_dims)(*stacked)), wanted)
    assert monitor.check() is None
    stacked[2][..., 0] = math.inf
    torch.vmap(added(fixed, monitor, 4), in_dims)(*stacked)
    assert monitor.check() == (4, math.inf)


def test_vmap_of_the_plain_functions() -> None:
    fixed, monitor = Fixed(), RangeMonitor()
    x, increment = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    increment[1, 0, 0] = math.inf
    held = Encoded(*torch.vmap(lambda x: tuple(fixed.encode(x, monitor)))(x))
    assert same(held, fixed.encode(x))
    got = torch.vmap(
        lambda value, residual, increment: tuple(
            fixed.add(Encoded(value, residual), increment, monitor, 2)
        )
    )(*held, increment)
    assert same(Encoded(*got), fixed.add(held, increment))
    assert monitor.poll() == (2, math.inf)


def test_function_transforms() -> None:
    fixed = Fixed()

    def loss(x: Tensor, increment: Tensor) -> Tensor:
        return (fixed_add(fixed_encode(x, fixed), increment, fixed).value ** 2).sum()

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
@pytest.mark.parametrize(
    ("fixed", "dtype"),
    [(Fixed(16), torch.bfloat16), (Fixed(), torch.float32)],
    ids=["16-bfloat16", "24-float32"],
)
def test_compiled(fixed: Fixed, dtype: torch.dtype, device: str) -> None:
    monitor = RangeMonitor()
    monitor.prepare(torch.device(device, 0) if device == "cuda" else torch.device(device))

    @torch.compile(fullgraph=True)
    def forward(
        value: Tensor, residual: Tensor, factor: Tensor, increment: Tensor
    ) -> tuple[Tensor, ...]:
        # The product is fused with the addition: it must be rounded to its dtype all the same.
        return tuple(fixed.add(Encoded(value, residual), factor * increment, monitor, 7))

    @torch.compile(fullgraph=True)
    def backward(value: Tensor, residual: Tensor, increment: Tensor) -> tuple[Tensor, ...]:
        return tuple(fixed.subtract(Encoded(value, residual), increment))

    integers, increment = edges(fixed, dtype, dtype)
    held = Encoded(*(part.to(device) for part in held_of(integers, fixed, dtype)))
    increment = increment.to(device)
    factor = torch.where(
        increment.isfinite() & (increment.abs() < 1e3), torch.randn_like(increment), 1
    )
    got = Encoded(*forward(*held, factor, increment))
    assert same(got, fixed.add(held, factor * increment))
    assert same(
        Encoded(*backward(*got, factor * increment)), fixed.subtract(got, factor * increment)
    )
    found = monitor.check()
    assert found is not None
    assert found.step == 7
    assert math.isnan(found.magnitude)


@pytest.mark.slow
def test_compiled_function_with_gradients() -> None:
    fixed, monitor = Fixed(), RangeMonitor()
    monitor.prepare(torch.device("cpu"))

    def loss(x: Tensor, increment: Tensor) -> tuple[Tensor, Tensor]:
        value, residual = fixed_add(
            fixed_encode(x, fixed, monitor), increment.sin(), fixed, monitor, 3
        )
        return (value**2).sum(), residual

    x, increment = torch.randn(2, 5, 6).unbind()
    inputs = x.requires_grad_(), increment.requires_grad_()
    total, residual = torch.compile(loss, fullgraph=True)(*inputs)
    grads = torch.autograd.grad(total, inputs)
    wanted_total, wanted_residual = loss(*inputs)
    assert (residual - wanted_residual).abs().max() <= 4  # sin is not the same to the last bit
    torch.testing.assert_close(grads, torch.autograd.grad(wanted_total, inputs))


def test_fake_tensors_and_tracing() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    fixed, monitor = Fixed(), RangeMonitor()
    with FakeTensorMode():
        held = fixed.encode(torch.empty(3, 4), monitor)
        new = fixed.add(held, torch.empty(3, 4, dtype=torch.bfloat16), monitor, 1)
        assert (new.value.shape, new.value.dtype, new.residual.dtype) == (
            (3, 4),
            torch.float32,
            torch.int16,
        )
    held, increment = fixed.encode(torch.randn(3, 4)), torch.randn(3, 4)
    graph = make_fx(lambda *args: tuple(fixed.add(Encoded(*args[:2]), args[2])))(*held, increment)
    increment[0, 0] = math.inf
    assert same(Encoded(*graph(*held, increment)), fixed.add(held, increment))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_export(dtype: torch.dtype) -> None:
    class Add(torch.nn.Module):
        def forward(self, value: Tensor, residual: Tensor, increment: Tensor) -> tuple[Tensor, ...]:
            return tuple(Fixed().add(Encoded(value, residual), increment))

    for x in (
        torch.randn(3, 4, dtype=dtype),
        torch.randn(4, 3, dtype=dtype).t(),
        torch.randn((), dtype=dtype),
    ):
        held, increment = Fixed().encode(x), torch.randn(x.shape)
        exported = torch.export.export(Add(), (*held, increment)).module()
        increment[(0,) * x.dim()] = math.inf
        assert same(Encoded(*exported(*held, increment)), Fixed().add(held, increment))


# The monitor


def test_findings_agree_between_implementations(implementation: Any) -> None:
    for fixed in FORMATS:
        monitor, quiet = RangeMonitor(), RangeMonitor()
        top = bound(fixed, torch.float32) - 1
        held = held_of([0, top, -top // 2, None], fixed, torch.float32)
        fine = torch.tensor([0.25, 0, -0.25, 0.5]) * fixed.limit
        implementation(fixed, held, fine, 1, quiet, 0)
        assert quiet.check() is None
        beyond = torch.tensor([0.25, 0.5, -0.75, math.nan]) * fixed.limit
        implementation(fixed, held, beyond, 1, monitor, 5)
        found = monitor.check()
        assert found is not None
        # What was no number before is old news; of the two sums, 1.5 and -1.25 limits, the larger
        # counts.
        assert found.step == 5
        assert found.magnitude == pytest.approx(1.5 * fixed.limit, rel=1e-6)


def test_the_first_step_and_its_largest_magnitude_are_reported() -> None:
    fixed, monitor = Fixed(), RangeMonitor()
    held = fixed.encode(torch.zeros(3), monitor)
    assert monitor.poll() is None
    for step, sizes in (
        (6, [1, math.nan, 1]),
        (4, [1, 1, 40_000]),
        (4, [1, 50_000, 1]),
        (5, [math.inf, 1, 1]),
    ):
        fixed.add(held, torch.tensor(sizes, dtype=torch.float32), monitor, step)
    monitor.flush()
    assert monitor.poll() == monitor.check() == (4, 50_000)
    fixed.encode(torch.tensor([-math.inf]), monitor)
    assert monitor.check() == (-1, math.inf)
    monitor.reset()
    assert monitor.poll() is None
    fixed.add(held, torch.tensor([1, math.nan, 1]), monitor, 1)
    found = monitor.poll()
    assert found is not None
    assert found.step == 1
    assert math.isnan(found.magnitude)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"]
)
def test_copies_of_a_monitor_start_empty(copied: Any) -> None:
    monitor = RangeMonitor()
    Fixed().encode(torch.tensor([math.nan]), monitor)
    other = copied(monitor)
    assert other.check() is None
    Fixed().add(Fixed().encode(torch.zeros(1)), torch.tensor([math.inf]), other, 3)
    assert other.check() == (3, math.inf)
    found = monitor.check()
    assert found is not None
    assert found.step == -1


def test_a_monitor_first_used_in_inference_serves_training() -> None:
    monitor = RangeMonitor()
    held = Fixed().encode(torch.zeros(2))
    with torch.inference_mode():
        Fixed().add(held, torch.tensor([1.0, math.inf]), monitor, 5)
    Fixed().add(held, torch.tensor([1.0, math.inf]), monitor, 2)
    assert monitor.check() == (2, math.inf)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_vanishing_outputs_are_counted(device: str) -> None:
    fixed, monitor = Fixed(16), RangeMonitor()
    held = fixed.encode(torch.zeros(8, 40_000, device=device))
    few = torch.where(torch.rand(8, 40_000, device=device) < 0.25, 1e-6, 1e-2)
    most = torch.where(torch.rand(8, 40_000, device=device) < 0.75, 1e-6, 1e-2)
    zeros = torch.zeros(8, 40_000, device=device)
    for step, increment in enumerate((few, most, zeros)):
        fixed.add(held, increment, monitor, step)
    monitor.check()
    news = monitor.vanishing()
    assert list(news) == [1]
    assert 0.7 < news[1] < 0.8
    assert monitor.vanishing() == {}
    # Only some of the later calls are looked at, here the second and the fourth.
    for call in range(2, 6):
        fixed.add(held, most if call in (3, 5) else few, monitor, 0)
    monitor.check()
    assert monitor.vanishing() == {}


# Checksums


@pytest.mark.parametrize(
    "dtype", [torch.int32, torch.int64, torch.float64, torch.float32, torch.bfloat16, torch.bool]
)
def test_checksum_sees_every_change(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    x = (torch.randn(3, 50) * 1000).to(dtype)
    total = checksum(x)
    assert (total.dtype, total.shape) == (torch.int64, ())
    assert total == checksum(x.clone())
    assert total == checksum(x.t().contiguous().t())
    seen = {int(total)}
    for i in range(x.numel()):
        changed = x.clone().reshape(-1)
        unsigned = changed.view(
            {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
        )
        unsigned[i] ^= 1
        seen.add(int(checksum(changed)))
    assert len(seen) == x.numel() + 1
    monkeypatch.setattr(checksums, "_PIECE_OF_CHECKSUM", 16)
    assert total == checksum(x)


def test_checksum_applies_negative_and_conjugate_bits() -> None:
    for dtype in (torch.complex64, torch.complex128):
        x = torch.randn(3, 5, dtype=dtype)
        assert checksum(x.conj()) == checksum(x.conj().resolve_conj())
        assert checksum(x.conj()) != checksum(x)
        negative = x.conj().imag
        assert negative.is_neg()
        assert checksum(negative) == checksum(negative.resolve_neg())


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_expanded_inputs_without_elements(shape: tuple[int, int]) -> None:
    x = torch.randn(1, 1)[:, : shape[1]][: shape[0]].expand(shape).requires_grad_()
    monitor = RangeMonitor()
    encoded = fixed_encode(x, Fixed(), monitor)
    new = fixed_add(encoded, x, Fixed(), monitor)
    new.value.sum().backward()
    assert new.value.shape == encoded.residual.shape == shape
    assert int(checksum(encoded.residual)) == 0
    with torch.no_grad():
        assert Fixed().subtract(new, x).value.shape == shape


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_checksum_of_lazy_and_expanded_tensors(dtype: torch.dtype) -> None:
    z = torch.randn(3, 4, dtype=dtype)
    lazy = [z.conj(), z.conj().imag, z.conj().imag[:, :1].expand(3, 4), z[:1].expand(3, 4)]
    for x in lazy:
        plain = x.resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
        assert checksum(x) == checksum(plain)
        plain.view(-1)[5] += 1
        assert checksum(x) != checksum(plain)
    assert checksum(z.conj()) != checksum(z)


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


# Scaled steps

RATIOS = [Fraction(1, 2), Fraction(1, 8), Fraction(1, 16), Fraction(9, 10), Fraction(99, 100)]
# Factors of increments: none, of whole bits, and one that no float holds.
GAINS = [1.0, 7 / 8, 0.1]
RATIO_IDS = [f"{ratio.numerator}-{ratio.denominator}" for ratio in RATIOS]

every_ratio = pytest.mark.parametrize("ratio", RATIOS, ids=RATIO_IDS)


@pytest.fixture(params=["plain", "cpu", "cpu-pieces", ON_KERNEL])
def device_of_steps(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the device on which scaled steps take one implementation."""
    if request.param == "plain":
        monkeypatch.setattr(scaled, "fusible", lambda *tensors: False)
    if request.param == "cpu-pieces":
        monkeypatch.setattr(cpu, "_PIECE", 29)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    if request.param != "kernel":
        return "cpu"
    need_kernel()
    if INTERPRETED:

        def forward(*arguments: Any) -> None:
            *tensors, factor, fraction_bits, monitor, step = arguments
            finding = None if monitor is None else monitor.prepare(torch.device("cpu")).key
            assert scaled._launched(*tensors, finding, 1, factor, fraction_bits, step)

        def backward(*arguments: Any) -> None:
            *tensors, factor, fraction_bits = arguments
            assert scaled._launched(*tensors, None, -1, factor, fraction_bits, 0)

        monkeypatch.setattr(cpu, "scale_and_add", forward)
        monkeypatch.setattr(cpu, "subtract_and_divide", backward)
    return DEVICE


def multiply_and_add(
    held: Any,
    factor: Fraction | Factor,
    addend: Any,
    fixed: Fixed,
    monitor: RangeMonitor | None,
    index: int,
    gain: float = 1.0,
    less: Any = None,
) -> BufferedStream:
    increment = Increment(addend, gain, less)
    return buffers.multiply_and_add(held, made(factor), increment, fixed, monitor, index)


def made(factor: Fraction | Factor) -> Factor:
    return factor_of(factor, None) if isinstance(factor, Fraction) else factor


def subtract_and_divide(
    held: BufferedStream,
    factor: Fraction | Factor,
    addend: Any,
    fixed: Fixed,
    gain: float = 1.0,
    less: Any = None,
) -> Any:
    increment = Increment(addend, gain, less)
    return buffers.subtract_and_divide(held, made(factor), increment, fixed)


class Integers:
    """A scaled stream in Python integers: counts, buffers that never end, and NaN as None."""

    def __init__(self, counts: list[int | None], fixed: Fixed, dtype: torch.dtype) -> None:
        self.counts, self.fixed, self.dtype = list(counts), fixed, dtype
        self.buffers = [0] * len(counts)

    def step(self, ratio: Fraction, increment: list[float]) -> None:
        n, d = ratio.numerator, ratio.denominator
        for i, count in enumerate(self.counts):
            quotient, rest = divmod(count or 0, d)
            digits, low = divmod(self.buffers[i], n)
            carry, digit = divmod(rest * n + low, d)
            self.buffers[i] = digits * d + digit
            product = None if count is None else quotient * n + carry
            self.counts[i] = combined(product, increment[i], 1, self.fixed, self.dtype)


def start_of(size: float, fixed: Fixed, dtype: torch.dtype) -> Encoded:
    """Return a stream of a size, NaN in one place."""
    x = torch.randn(3, 16, dtype=torch.float64) * size
    x[0, 1] = math.nan
    return fixed.encode(x.to(dtype))


def to(held: Any, device: str) -> Any:
    return pytree.tree_map(lambda leaf: leaf.to(device), held)


@every_ratio
@pytest.mark.parametrize("dtype", FLOATS[1:], ids=FLOAT_IDS[1:])
def test_scaled_steps_equal_python_integers(
    device_of_steps: str, ratio: Fraction, dtype: torch.dtype
) -> None:
    fixed = Fixed()
    start = start_of(1.0, fixed, dtype)
    known = (~start.value.isnan()).flatten().tolist()
    integers = [
        count if k else None
        for count, k in zip(fixed.counts(start)[0].flatten().tolist(), known, strict=True)
    ]
    wanted = Integers(integers, fixed, dtype)
    held: Any = to(start, device_of_steps)
    for index in range(7):
        increment = (torch.randn(3, 16) * 10.0 ** (index - 4)).to(dtype)
        gain = GAINS[index % len(GAINS)]
        # float64 holds the product of two float32 numbers, which is rounded once.
        added = (increment.double() * torch.tensor(gain).double()).float()
        less = None
        if index % 2:
            less = torch.randn(3, 16).to(FLOATS[index % 3 + 1])
            added = increment.float() - less.float()
            added = (added.double() * torch.tensor(gain).double()).float()
            less = less.to(device_of_steps)
        wanted.step(ratio, added.flatten().tolist())
        held = multiply_and_add(
            held, ratio, increment.to(device_of_steps), fixed, None, index, gain, less
        )
        got = to(held, "cpu")
        flat = Encoded(*(part.flatten() for part in got.stream))
        assert same(flat, held_of(wanted.counts, fixed, dtype))
        if not got.full:
            assert unsigned(got.buffer).flatten().tolist() == wanted.buffers


def unsigned(buffer: Tensor) -> Tensor:
    """Return the numbers of a buffer, as int64."""
    return buffer.to(torch.int64) & (2 ** (8 * buffer.element_size()) - 1)


@pytest.mark.parametrize("dtype", FLOATS[1:], ids=FLOAT_IDS[1:])
@given(
    data=st.data(),
    ratios=st.lists(st.sampled_from(RATIOS), min_size=1, max_size=60),
    increment_dtype=st.sampled_from(FLOATS),
    size=st.sampled_from([1e-6, 1e-2, 1.0, 100.0, 20_000.0]),
    seed=st.integers(0, 1000),
    one=st.booleans(),
    gain=st.sampled_from(GAINS),
    less_dtype=st.sampled_from([None, *FLOATS]),
)
def test_scaled_steps_of_every_implementation_are_equal_and_undone(
    device_of_steps: str,
    data: st.DataObject,
    ratios: list[Fraction],
    dtype: torch.dtype,
    increment_dtype: torch.dtype,
    size: float,
    seed: int,
    one: bool,
    gain: float,
    less_dtype: torch.dtype | None,
) -> None:
    torch.manual_seed(seed)
    fixed = Fixed()
    if one:
        ratios = ratios[:1] * len(ratios)
    bad = data.draw(st.sampled_from([None, math.nan, math.inf, -math.inf, 3e38, 40_000.0]))
    place = data.draw(st.integers(0, len(ratios) - 1))
    held: Any = to(start_of(size, fixed, dtype), device_of_steps)
    befores, increments, lesses = [], [], []
    less = None
    monitor, plain = RangeMonitor(), RangeMonitor()
    for index, ratio in enumerate(ratios):
        increment = (torch.randn(3, 16) * size).to(increment_dtype)
        if index == place and bad is not None:
            increment[1, 2] = bad
        increment = increment.to(device_of_steps)
        befores.append(held)
        increments.append(increment)
        if less_dtype is not None:
            less = (torch.randn(3, 16) * size).to(less_dtype).to(device_of_steps)
        lesses.append(less)
        held = multiply_and_add(held, ratio, increment, fixed, monitor, index, gain, less)
        wanted = by_reference(befores[-1], held, ratio, increment, fixed, plain, index, gain, less)
        assert equal_streams(held, wanted)
    found, wanted_found = monitor.check(), plain.check()
    assert (found is None) == (wanted_found is None)
    if found is not None and wanted_found is not None:
        assert found.step == wanted_found.step
        assert found.magnitude == pytest.approx(wanted_found.magnitude, rel=1e-6, nan_ok=True)
    lost = pytree.tree_leaves(held)[0].isnan()
    taken = zip(ratios, befores, increments, lesses, strict=True)
    for ratio, before, increment, less in reversed(list(taken)):
        held = subtract_and_divide(held, ratio, increment, fixed, gain, less)
        pairs = zip(pytree.tree_leaves(held), pytree.tree_leaves(before), strict=True)
        for a, b in pairs:
            assert a.dtype == b.dtype
            assert a[~lost].equal(b[~lost])


def by_reference(
    before: Any,
    after: BufferedStream,
    factor: Fraction | Factor,
    increment: Tensor,
    fixed: Fixed,
    monitor: RangeMonitor,
    index: int,
    gain: float = 1.0,
    less: Tensor | None = None,
) -> BufferedStream:
    """Return what plain torch makes of the same step."""
    assert after.past is not None
    begun = after.past.begun
    stream, buffer = plain_torch.scale_and_add(
        before.stream if isinstance(before, BufferedStream) else before,
        None if begun else before.buffer,
        Increment(increment, gain, less),
        made(factor),
        after.buffer.dtype,
        fixed.fraction_bits,
        monitor,
        index,
    )
    return BufferedStream(stream, buffer, after.full, after.past)


def equal_streams(a: BufferedStream, b: BufferedStream) -> bool:
    leaves = zip(pytree.tree_leaves(a), pytree.tree_leaves(b), strict=True)
    return all(
        x.dtype == y.dtype and x.stride() == y.stride() and bits(x).equal(bits(y))
        for x, y in leaves
    )


@every_dtype
@every_format
def test_scaled_steps_at_the_edges(device_of_steps: str, fixed: Fixed, dtype: torch.dtype) -> None:
    for ratio in (Fraction(1, 8), Fraction(9, 10)):
        integers, increment = edges(fixed, torch.float32, dtype)
        held: Any = to(held_of(integers, fixed, dtype), device_of_steps)
        increment = increment.to(device_of_steps)
        for index in range(2):
            before = held
            held = multiply_and_add(held, ratio, increment, fixed, None, index)
            wanted = by_reference(before, held, ratio, increment, fixed, RangeMonitor(), index)
            assert equal_streams(held, wanted)
            back = subtract_and_divide(held, ratio, increment, fixed)
            known = ~held.stream.value.isnan()
            for a, b in zip(pytree.tree_leaves(back), pytree.tree_leaves(before), strict=True):
                assert a[known].equal(b[known])


@pytest.mark.parametrize("layout", layouts(16))
def test_layouts_of_scaled_steps(layout: str, device_of_steps: str) -> None:
    fixed, ratio = Fixed(), Fraction(1, 8)
    x, increment = (tensor.to(device_of_steps) for tensor in layouts(16)[layout])
    start: Any = fixed.encode(x)
    increment = increment.expand(start.value.shape)
    held = start
    for index in range(7):
        held = multiply_and_add(held, ratio, increment, fixed, None, index)
    plain = fixed.encode(x.contiguous())
    for index in range(7):
        plain = multiply_and_add(plain, ratio, increment.clone(), fixed, None, index)
    leaves = pytree.tree_leaves(held), pytree.tree_leaves(plain)
    assert all(a.equal(b) for a, b in zip(*leaves, strict=True))
    assert {strides(leaf) for leaf in leaves[0]} == {strides(start.value + 1)}
    for _ in range(7):
        held = subtract_and_divide(held, ratio, increment, fixed)
    assert equal(held, start)


@pytest.mark.parametrize(
    ("bits_per_step", "steps", "size"),
    [(1, 24, 3), (2, 24, 6), (3, 24, 10), (1, 96, 12), (2, 96, 24), (3, 96, 39)],
)
def test_bytes_of_buffers(bits_per_step: int, steps: int, size: int) -> None:
    fixed, ratio = Fixed(), Fraction(1, 2**bits_per_step)
    held: Any = fixed.encode(torch.randn(5))
    for index in range(steps):
        held = multiply_and_add(held, ratio, torch.randn(5), fixed, None, index)
    assert sum(buffer.element_size() for buffer in (*held.full, held.buffer)) == size


def test_buffers_of_decimal_factors_stay_narrow() -> None:
    fixed = Fixed()
    for gamma, steps, size in (("0.9", 24, 2), ("0.99", 24, 2), ("0.9", 96, 4)):
        held: Any = fixed.encode(torch.randn(5))
        for index in range(steps):
            held = multiply_and_add(held, Fraction(gamma), torch.randn(5), fixed, None, index)
        assert sum(buffer.element_size() for buffer in (*held.full, held.buffer)) == size


def test_gradients_of_scaled_steps() -> None:
    fixed, ratio = Fixed(37), Fraction(1, 8)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    increment = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, increment: Tensor) -> Tensor:
        held: Any = Encoded(*fixed_encode(x, fixed))
        for index in range(3):
            held = multiply_and_add(held, ratio, increment.sin(), fixed, None, index)
        return held.stream.value**2

    def smooth(x: Tensor, increment: Tensor) -> Tensor:
        for _ in range(3):
            x = x / 8 + increment.sin()
        return x**2

    for order in (1, 2):
        grads = [derivative(f, order, x, increment) for f in (run, smooth)]
        torch.testing.assert_close(grads[0], grads[1], atol=1e-9, rtol=1e-9)
    tangents = torch.randn(2, 3, 4, dtype=torch.float64).unbind()
    for f in (torch.func.jvp, dual):
        got, want = (f(g, (x.detach(), increment.detach()), tangents)[1] for g in (run, smooth))
        torch.testing.assert_close(got, want, atol=1e-9, rtol=1e-9)


def dual(f: Any, inputs: tuple[Tensor, ...], tangents: tuple[Tensor, ...]) -> Any:
    """Return what torch.func.jvp does, by torch.autograd.forward_ad."""
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(*pair) for pair in zip(inputs, tangents, strict=True)]
        return forward_ad.unpack_dual(f(*duals))


# Steps whose factors are tensors

SCALES = {
    "each": (3, 16),
    "channel": (16,),
    "token": (3, 1),
    "one": (),
}


def factors_of(
    shape: tuple[int, ...], least: float, dtype: torch.dtype, bad: float | None = None
) -> Factor:
    """Return random factors from `least` to its inverse."""
    scale = least ** (2 * torch.rand(shape, dtype=torch.float64) - 1)
    if bad is not None:
        scale.view(-1)[-1] = bad
    return factor_of(scale.to(dtype), least)


def numerator_of(factor: float, least: int) -> int | None:
    """Return a factor as a multiple of 2^-24, None where it is none or out of bounds."""
    if not math.isfinite(factor):
        return None
    n = round(Fraction(factor) * DENOMINATOR)
    return n if least <= n < NUMERATORS else None


class IntegersOfTheirOwn(Integers):
    """A stream of which each number has a factor of its own, in Python integers."""

    def multiply(self, least: int, factors: list[float], increment: list[float]) -> None:
        limit = 0.99 * self.fixed.limit_in(self.dtype) / self.fixed.unit
        for i, count in enumerate(self.counts):
            n = numerator_of(factors[i], least)
            inside = n is not None and count is not None
            if n is not None and count is not None:
                inside = abs(float(count) * float(n)) < limit * DENOMINATOR
            quotient, rest = divmod(count or 0, DENOMINATOR)
            n = least if n is None else n
            digits, low = divmod(self.buffers[i], n)
            carry, digit = divmod(rest * n + low, DENOMINATOR)
            self.buffers[i] = digits * DENOMINATOR + digit
            product = quotient * n + carry if inside else None
            self.counts[i] = combined(product, increment[i], 1, self.fixed, self.dtype)


@pytest.mark.parametrize("bad", [None, 0.0, -1.0, math.nan, math.inf, 16384.0])
@pytest.mark.parametrize("dtype", FLOATS[1:], ids=FLOAT_IDS[1:])
def test_steps_of_tensor_factors_equal_python_integers(
    device_of_steps: str, dtype: torch.dtype, bad: float | None
) -> None:
    fixed = Fixed()
    start = start_of(1.0, fixed, dtype)
    known = (~start.value.isnan()).flatten().tolist()
    integers = [
        count if k else None
        for count, k in zip(fixed.counts(start)[0].flatten().tolist(), known, strict=True)
    ]
    wanted = IntegersOfTheirOwn(integers, fixed, dtype)
    held: Any = to(start, device_of_steps)
    for index, (shape, least) in enumerate(
        zip(SCALES.values(), (0.9, 0.3, 1e-4, 0.5), strict=True)
    ):
        factor = factors_of(shape, least, FLOATS[index], bad if index == 1 else None)
        increment = (torch.randn(3, 16) * 10.0 ** (index - 4)).to(dtype)
        each = factor.scale.double().expand(3, 16).flatten().tolist()
        wanted.multiply(factor.least, each, increment.flatten().tolist())
        there = factor._replace(scale=factor.scale.to(device_of_steps))
        held = multiply_and_add(held, there, increment.to(device_of_steps), fixed, None, index)
        got = to(held, "cpu")
        flat = Encoded(*(part.flatten() for part in got.stream))
        assert same(flat, held_of(wanted.counts, fixed, dtype))
        assert not got.full
        assert unsigned(got.buffer).flatten().tolist() == wanted.buffers
    assert got.stream.value.isnan().sum() == (1 if bad is None else 4)


@st.composite
def tensor_factors(draw: st.DrawFn) -> Factor:
    """Draw factors of any shape and type, one of them perhaps out of bounds."""
    bad = draw(st.sampled_from([None] * 6 + [0.0, -1.0, math.nan, math.inf, 16384.0, 1e-30]))
    dtype = draw(st.sampled_from(FLOATS))
    shape = draw(st.sampled_from(list(SCALES.values())))
    return factors_of(shape, draw(st.sampled_from([0.999, 0.74, 0.135, 1e-3, 1e-9])), dtype, bad)


@pytest.mark.parametrize("dtype", FLOATS[1:], ids=FLOAT_IDS[1:])
@given(
    data=st.data(),
    factors=st.lists(st.one_of(tensor_factors(), st.sampled_from(RATIOS)), min_size=1, max_size=30),
    fixed=st.sampled_from(FORMATS),
    increment_dtype=st.sampled_from(FLOATS),
    size=st.sampled_from([1e-6, 1e-2, 1.0, 100.0, 20_000.0]),
    seed=st.integers(0, 1000),
)
def test_tensor_factors_in_every_implementation_are_equal_and_undone(
    device_of_steps: str,
    data: st.DataObject,
    factors: list[Factor | Fraction],
    fixed: Fixed,
    dtype: torch.dtype,
    increment_dtype: torch.dtype,
    size: float,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    bad = data.draw(st.sampled_from([None, math.nan, math.inf, -math.inf, 3e38, 40_000.0]))
    place = data.draw(st.integers(0, len(factors) - 1))
    held: Any = to(start_of(size, fixed, dtype), device_of_steps)
    taken = []
    monitor, plain = RangeMonitor(), RangeMonitor()
    for index, factor in enumerate(factors):
        if isinstance(factor, Factor):
            factor = factor._replace(scale=factor.scale.to(device_of_steps))
        increment = (torch.randn(3, 16) * size).to(increment_dtype)
        if index == place and bad is not None:
            increment[1, 2] = bad
        increment = increment.to(device_of_steps)
        before = held
        taken.append((factor, before, increment))
        held = multiply_and_add(before, factor, increment, fixed, monitor, index)
        wanted = by_reference(before, held, factor, increment, fixed, plain, index)
        assert equal_streams(held, wanted)
    found, wanted_found = monitor.check(), plain.check()
    assert (found is None) == (wanted_found is None)
    if found is not None and wanted_found is not None:
        assert found.step == wanted_found.step
        assert found.magnitude == pytest.approx(wanted_found.magnitude, rel=1e-6, nan_ok=True)
    lost = pytree.tree_leaves(held)[0].isnan()
    for factor, before, increment in reversed(taken):
        held = subtract_and_divide(held, factor, increment, fixed)
        for a, b in zip(pytree.tree_leaves(held), pytree.tree_leaves(before), strict=True):
            assert a.dtype == b.dtype
            assert a[~lost].equal(b[~lost])


@every_dtype
@every_format
def test_tensor_factors_at_the_edges(
    device_of_steps: str, fixed: Fixed, dtype: torch.dtype
) -> None:
    integers, increment = edges(fixed, torch.float32, dtype)
    start = to(held_of(integers, fixed, dtype), device_of_steps)
    increment = increment.to(device_of_steps)
    for least in (0.5, 1e-9):
        factor = factors_of(increment.shape, least, torch.float64)
        factor.scale[::3] = factor.least / DENOMINATOR
        factor.scale[1::7] = 1.0
        factor.scale[2::11] = (NUMERATORS - 1) / DENOMINATOR
        factor = factor._replace(scale=factor.scale.to(device_of_steps))
        held: Any = start
        for index in range(2):
            before = held
            held = multiply_and_add(held, factor, increment, fixed, None, index)
            wanted = by_reference(before, held, factor, increment, fixed, RangeMonitor(), index)
            assert equal_streams(held, wanted)
            back = subtract_and_divide(held, factor, increment, fixed)
            known = ~held.stream.value.isnan()
            for a, b in zip(pytree.tree_leaves(back), pytree.tree_leaves(before), strict=True):
                assert a[known].equal(b[known])


@pytest.mark.parametrize("share", [0.98, 0.9899, 0.9901, 1.01])
def test_products_close_to_the_limit_are_out_of_range(device_of_steps: str, share: float) -> None:
    fixed, monitor = Fixed(), RangeMonitor()
    start = to(fixed.encode(torch.tensor([-share * fixed.limit / 2])), device_of_steps)
    factor = factor_of(torch.tensor([2.0]).to(device_of_steps), 0.5)
    zero = torch.zeros(1).to(device_of_steps)
    held = multiply_and_add(start, factor, zero, fixed, monitor, 3)
    if share < 0.99:
        assert monitor.check() is None
        assert held.stream.value.item() == pytest.approx(-share * fixed.limit)
        assert equal(subtract_and_divide(held, factor, zero, fixed), start)
    else:
        assert held.stream.value.isnan().all()
        assert monitor.check() == (3, pytest.approx(share * fixed.limit))


@pytest.mark.parametrize("layout", layouts(16))
def test_layouts_of_tensor_factors(layout: str, device_of_steps: str) -> None:
    fixed = Fixed()
    x, increment = (tensor.to(device_of_steps) for tensor in layouts(16)[layout])
    start: Any = fixed.encode(x)
    increment = increment.expand(start.value.shape)
    # Of the layout of the increment, where that has one of its own.
    factor = factor_of(increment.sigmoid() + 0.5, 0.5)
    shapes = {tuple(1 if stride == 0 else size for size, stride in sizes(increment))}
    shapes |= {(), tuple(start.value.shape), (1,) * start.value.dim()}
    for shape in shapes:
        scale = torch.rand(shape, device=device_of_steps) + 0.5
        for each in (factor, factor._replace(scale=scale), factor._replace(scale=scale.bfloat16())):
            held, plain = start, Encoded(*(part.contiguous() for part in start))
            dense = each._replace(scale=each.scale.expand(x.shape).contiguous())
            for index in range(3):
                held = multiply_and_add(held, each, increment, fixed, None, index)
                plain = multiply_and_add(plain, dense, increment.clone(), fixed, None, index)
            leaves = pytree.tree_leaves(held), pytree.tree_leaves(plain)
            assert all(a.equal(b) for a, b in zip(*leaves, strict=True))
            assert {strides(leaf) for leaf in leaves[0]} == {strides(start.value + 1)}
            for _ in range(3):
                held = subtract_and_divide(held, each, increment, fixed)
            assert equal(held, start)


def sizes(x: Tensor) -> list[tuple[int, int]]:
    """Return size and stride of each dimension."""
    return list(zip(x.shape, x.stride(), strict=True))


@pytest.mark.parametrize("shape", list(SCALES.values()), ids=list(SCALES))
def test_gradients_of_tensor_factors(shape: tuple[int, ...]) -> None:
    fixed = Fixed(37)
    inputs = [
        torch.randn(size, dtype=torch.float64, requires_grad=True)
        for size in ((3, 16), (3, 16), shape)
    ]

    def run(x: Tensor, increment: Tensor, raw: Tensor) -> Tensor:
        held: Any = Encoded(*fixed_encode(x, fixed))
        for index in range(3):
            factor = factor_of(raw.tanh().exp(), math.exp(-1))
            held = multiply_and_add(held, factor, increment.sin(), fixed, None, index)
        return held.stream.value**2

    def smooth(x: Tensor, increment: Tensor, raw: Tensor) -> Tensor:
        for _ in range(3):
            x = x * raw.tanh().exp() + increment.sin()
        return x**2

    # A factor is rounded to multiples of 2^-24.
    near = {"atol": 1e-5, "rtol": 1e-5}
    for order in (1, 2):
        for got, want in zip(*(derivative(f, order, *inputs) for f in (run, smooth)), strict=True):
            torch.testing.assert_close(got, want, **near)
    plain = tuple(x.detach() for x in inputs)
    tangents = tuple(torch.randn_like(x) for x in plain)
    for f in (torch.func.jvp, dual):
        got, want = (f(g, plain, tangents)[1] for g in (run, smooth))
        torch.testing.assert_close(got, want, **near)
    got, want = (
        torch.func.vmap(torch.func.grad(lambda *x, g=g: g(*x).sum(), 1), (0, 0, None))(
            *(x.expand(2, *x.shape) for x in plain[:2]), plain[2]
        )
        for g in (run, smooth)
    )
    torch.testing.assert_close(got, want, **near)


@pytest.mark.parametrize(
    "scale_dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"]
)
@pytest.mark.parametrize("shape", list(SCALES.values()), ids=list(SCALES))
def test_gradients_of_tensor_factors_are_those_of_floats_in_every_bit(
    shape: tuple[int, ...], scale_dtype: torch.dtype
) -> None:
    fixed = Fixed()
    x = fixed.encode(torch.randn(3, 16)).value.requires_grad_()
    increment = torch.randn(3, 16).bfloat16().requires_grad_()
    scale = (torch.rand(shape) + 0.5).to(scale_dtype).requires_grad_()
    weight = torch.randn(3, 16)
    held = Encoded(x, torch.zeros(3, 16, dtype=torch.int16))
    y = multiply_and_add(held, factor_of(scale, 0.5), increment, fixed, None, 0).stream.value
    like = x * scale.to(x.dtype) + increment.to(x.dtype)
    torch.testing.assert_close(y, like, atol=1e-6, rtol=1e-6)
    inputs = x, increment, scale
    grads = (torch.autograd.grad(z, inputs, weight) for z in (y, like))
    for got, want in zip(*grads, strict=True):
        assert got.dtype == want.dtype
        assert bits(got).equal(bits(want))


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3)))
def test_what_a_tensor_factor_saves(needs: tuple[bool, ...]) -> None:
    fixed = Fixed()
    saved: list[Tensor] = []
    x, increment, scale = ((torch.rand(3, 4) + 0.5).requires_grad_(need) for need in needs)
    held = Encoded(x, torch.zeros(3, 4, dtype=torch.int16))
    for product in (
        lambda: multiply_and_add(held, factor_of(scale, 0.5), increment, fixed, None, 0),
        # What a replay saves.
        lambda: save_product(x, scale),
    ):
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda _: None):
            product()
        wanted = [x] * needs[2] + [scale] * needs[0]
        assert len(saved) == len(wanted)
        assert all(a.data_ptr() == b.data_ptr() for a, b in zip(saved, wanted, strict=True))


# CUDA


@pytest.mark.gpu
@every_dtype
@every_increment
@every_format
@pytest.mark.parametrize("size", [1 << 20, 999_983])
def test_cuda_equals_cpu(
    fixed: Fixed, increment_dtype: torch.dtype, dtype: torch.dtype, size: int
) -> None:
    need_kernel()
    x = (torch.randn(size + 1) * fixed.limit / 8).to(dtype)
    increment = (torch.randn(size + 1) * torch.logspace(-12, 1, size + 1) * fixed.limit).to(
        increment_dtype
    )
    for start in (0, 1):  # memory that does and does not allow 16-byte accesses
        part = slice(start, start + size)
        held = Encoded(*(piece[part] for piece in fixed.encode(x)))
        there = Encoded(*(piece[part] for piece in fixed.encode(x.cuda())))
        wanted = fixed.add(held, increment[part])
        got = fixed.add(there, increment.cuda()[part])
        back = fixed.subtract(got, increment.cuda()[part])
        wanted_back = fixed.subtract(wanted, increment[part])
        assert same(Encoded(*(piece.cpu() for piece in got)), wanted)
        assert same(Encoded(*(piece.cpu() for piece in back)), wanted_back)
        assert checksum(got.residual).cpu() == checksum(wanted.residual)


@pytest.mark.gpu
@every_dtype
@pytest.mark.parametrize(
    ("factor", "steps"),
    [*((ratio, 7) for ratio in RATIOS), *((dtype, 12) for dtype in FLOATS)],
    ids=[*RATIO_IDS, *(f"tensor-{name}" for name in FLOAT_IDS)],
)
@pytest.mark.parametrize("size", [1 << 20, 999_983])
def test_scaled_steps_on_cuda_equal_the_cpu(
    factor: Fraction | torch.dtype, steps: int, dtype: torch.dtype, size: int
) -> None:
    """Steps that scale by a ratio, or by a tensor of this dtype."""
    need_kernel()
    fixed = Fixed()
    x = fixed.encode((torch.randn(size + 1) * fixed.limit / 8).to(dtype))
    increment = (torch.randn(size + 1) * torch.logspace(-12, 1, size + 1) * fixed.limit).to(dtype)
    if isinstance(factor, torch.dtype):
        factors = factors_of((size + 1,), 0.5, factor, bad=math.nan)
    for begin in (0, 1):  # memory that does and does not allow 16-byte accesses
        part = slice(begin, begin + size)
        here: Any = Encoded(*(piece[part] for piece in x))
        start = Encoded(*(piece.cuda()[part] for piece in x))
        there: Any = start
        addend = increment.cuda()[part]
        by: Any = factor
        by_there: Any = factor
        if isinstance(factor, torch.dtype):
            by = factors._replace(scale=factors.scale[part])
            by_there = factors._replace(scale=factors.scale.cuda()[part])
        for index in range(steps):
            here = multiply_and_add(here, by, increment[part], fixed, None, index)
            there = multiply_and_add(there, by_there, addend, fixed, None, index)
        assert equal_streams(to(there, "cpu"), here)
        known = ~there.stream.value.isnan()
        for _ in range(steps):
            there = subtract_and_divide(there, by_there, addend, fixed)
        assert all(a[known].equal(b[known]) for a, b in zip(there, start, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["ratio", "tensor"])
def test_scaled_steps_do_not_synchronise(kind: str) -> None:
    need_kernel()
    fixed, monitor = Fixed(), RangeMonitor()
    ratio: Any = Fraction(1, 8)
    if kind == "tensor":
        scale = torch.full((64,), 0.125, device="cuda").requires_grad_()
        ratio = factor_of(scale, 0.125)
    x = torch.randn(64, 64, device="cuda", requires_grad=True)
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        held: Any = fixed_encode(x, fixed, monitor)
        for index in range(7):
            held = multiply_and_add(held, ratio, x, fixed, monitor, index)
        held.stream.value.sum().backward()
        held = pytree.tree_map(torch.Tensor.detach, held)
        for _ in range(7):
            held = subtract_and_divide(held, ratio, x.detach(), fixed)
        multiply_and_add(held, ratio, torch.full_like(x, math.inf), fixed, monitor, 8)
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    assert equal(held, fixed.encode(x.detach()))
    assert monitor.check() == (8, math.inf)


@pytest.mark.gpu
def test_cuda_without_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    need_kernel()
    from revnet._streams import cuda

    integers, increment = edges(Fixed(), torch.bfloat16, torch.bfloat16)
    held = Encoded(*(part.cuda() for part in held_of(integers, Fixed(), torch.bfloat16)))
    wanted = Fixed().add(held, increment.cuda())
    monkeypatch.setitem(cuda._state, "broken", True)
    assert same(Fixed().add(held, increment.cuda()), wanted)
    encoded = Fixed().encode(increment.cuda())
    assert same(Encoded(*(part.cpu() for part in encoded)), Fixed().encode(increment))


@pytest.mark.gpu
def test_nothing_synchronises() -> None:
    need_kernel()
    fixed, monitor = Fixed(), RangeMonitor()
    x = torch.randn(64, 64, device="cuda", requires_grad=True)
    bad = torch.full((64, 64), math.inf, device="cuda")
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        held = fixed_add(fixed_encode(x, fixed, monitor), x, fixed, monitor, 0)
        held.value.sum().backward()
        held = fixed.subtract(Encoded(held.value.detach(), held.residual), x.detach())
        fixed.add(held, bad, monitor, 3)
        monitor.flush()
        monitor.poll()
        monitor.vanishing()
        total = checksum(held.residual)
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    torch.cuda.synchronize()
    assert monitor.poll() == (3, math.inf)
    assert total == checksum(held.residual.cpu()).cuda()


@pytest.mark.gpu
def test_cuda_graph() -> None:
    need_kernel()
    fixed, monitor = Fixed(), RangeMonitor()
    held = fixed.encode(torch.randn(64, 64, device="cuda"))
    increment = torch.randn(64, 64, device="cuda")

    def step() -> Encoded:
        result = fixed.add(held, increment, monitor, 9)
        monitor.flush()
        return result

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        new = step()
    increment.copy_(torch.randn(64, 64, device="cuda"))
    graph.replay()
    torch.cuda.synchronize()
    assert same(new, fixed.add(held, increment))
    assert monitor.poll() is None
    increment[3, 4] = -math.inf
    graph.replay()
    torch.cuda.synchronize()
    assert new.value[3, 4].isnan()
    assert monitor.poll() == (9, math.inf)


@pytest.mark.gpu
def test_a_first_call_in_a_capture_is_refused() -> None:
    need_kernel()
    held, monitor = Fixed().encode(torch.randn(8, device="cuda")), RangeMonitor()
    graph = torch.cuda.CUDAGraph()
    with (
        pytest.raises(RuntimeError, match="run the sequence once before capturing"),
        torch.cuda.graph(graph),
    ):
        Fixed().add(held, torch.ones(8, device="cuda"), monitor, 0)


def test_a_bound_launch_hands_over_addresses_or_declines(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from triton import knobs

    from revnet._streams import cuda

    launched: list[tuple[Any, ...]] = []

    class Built:
        function, packed_metadata = "function", "packed"

        def run(self, *arguments: Any) -> None:
            launched.append(arguments)

    monkeypatch.setattr(cuda, "current_cuda_device", lambda: 3)
    monkeypatch.setattr(cuda, "current_cuda_stream", lambda device: ("stream", device))
    launch = cuda._bind(Built(), 3, (0.5, 1))
    x = torch.zeros(1040)
    where = x.data_ptr()
    assert where % 16 == 0
    assert launch((where, None), where | 1040, 1040, 7)
    usual = (3, 1, 1, ("stream", 3), "function", "packed", None, None, None)
    assert launched == [(*usual, where, None, 1040, 7, 0.5, 1)]
    # Another build: addresses or sizes that are no multiples of 16, sizes beyond 32 bits.
    assert not launch((where + 4, None), (where + 4) | 1040, 1040, 7)
    assert not launch((where, None), where | 1039, 1039, 7)
    assert not launch((where, None), where | 2**31, 2**31, 7)
    assert not launch((where, None), where, 0, 7)
    monkeypatch.setattr(cuda, "current_cuda_device", lambda: 2)
    assert not launch((where, None), where | 1040, 1040, 7)
    monkeypatch.setattr(cuda, "current_cuda_device", lambda: 3)
    for name in ("launch_enter_hook", "launch_exit_hook"):
        hook = getattr(knobs.runtime, name)
        hook.add(print)
        try:
            assert not launch((where, None), where | 1040, 1040, 7)
        finally:
            hook.remove(print)
    assert len(launched) == 1


class Own(Tensor):
    """A subclass, which may keep its numbers elsewhere."""


def outlived() -> Tensor:
    left: list[Tensor] = []
    torch.func.grad(lambda x: (left.append(x * 1), x.sum())[1])(torch.ones(4, 16))
    return left[0]


# What a kernel cannot read by address, or would read in another order.
UNREADABLE = {
    "negated": lambda: torch.randn(4, 16, dtype=torch.complex64).conj().imag,
    "transposed": lambda: torch.randn(16, 4).t(),
    "expanded": lambda: torch.randn(4, 1).expand(4, 16),
    "broadcast": lambda: torch.randn(16),
    "subclass": lambda: torch.randn(4, 16).as_subclass(Own),
    "parameter": lambda: torch.nn.Parameter(torch.randn(4, 16), requires_grad=False),
    "outlived": outlived,
    "zero": lambda: torch._efficientzerotensor((4, 16)),
}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Have every kernel built before for the CPU, as it seems; return what they are asked."""
    asked: list[Any] = []

    def launch(*arguments: Any) -> bool:
        asked.append(arguments)
        return False

    for step in itertools.product((torch.float32, torch.bfloat16), (1, -1), (True, False)):
        value, sign, silent = step
        key = value, torch.float32, -1, sign, 24, silent
        monkeypatch.setitem(dispatch.LAUNCHES, key, launch)
    return asked


@pytest.mark.parametrize("kind", UNREADABLE)
def test_a_kernel_is_not_launched_on_memory_that_it_cannot_read(
    kind: str, asked: list[Any]
) -> None:
    fixed, increment = Fixed(), UNREADABLE[kind]()
    held = fixed.encode(torch.randn(4, 16))
    found = fixed.add(held, increment)
    assert not asked
    assert same(found, plain_torch.combine(held, increment, 1, 24, None, 0))


def test_a_kernel_is_not_launched_on_a_stream_that_it_cannot_read(asked: list[Any]) -> None:
    fixed, x = Fixed(), torch.randn(4, 16)
    value, residual = fixed.encode(x)
    gaps = torch.zeros(4, 32, dtype=residual.dtype)[:, ::2].copy_(residual)
    other = torch.zeros(4, 32)[:, ::2].copy_(value)
    for held in (
        Encoded(value, gaps),
        Encoded(other, residual),
        Encoded(value.as_subclass(Own), residual),
    ):
        fixed.subtract(held, x)
    assert not asked


def test_a_kernel_that_declines_leaves_no_trace(asked: list[Any]) -> None:
    fixed, monitor = Fixed(), RangeMonitor()
    x = torch.randn(4, 16).bfloat16()
    increment = torch.full((4, 16), 1e-9)
    monitor.addresses[-1] = 1234
    held = fixed.encode(x)
    found = fixed.add(held, increment, monitor, 3)
    (((*read, value, residual, finding), bits, size, key),) = asked
    assert read == [part.data_ptr() for part in (*held, increment)]
    assert (finding, size, key) == (1234, 64, key_of(3))
    assert all(bits | address == bits for address in (*read, value, residual, size))
    assert same(found, plain_torch.combine(held, increment, 1, 24, None, 0))
    assert monitor.vanishing() == {3: 1.0}
    # Sampled once a call: next in the second, not in the third.
    fixed.add(held, increment, monitor, 3)
    assert monitor._awaited == {3}
    monitor.vanishing()
    fixed.add(held, increment, monitor, 3)
    assert not monitor._awaited


@pytest.mark.gpu
def test_hooks_of_triton_see_each_launch() -> None:
    from triton import knobs

    need_kernel()
    fixed, seen = Fixed(), []
    x = torch.randn(64, 64, device="cuda")
    held = fixed.encode(x)
    wanted = fixed.add(held, x)

    def hook(metadata: Any) -> None:
        seen.append(metadata.get()["name"])

    knobs.runtime.launch_enter_hook.add(hook)
    try:
        found = fixed.add(held, x)
    finally:
        knobs.runtime.launch_enter_hook.remove(hook)
    assert seen == ["_combine"]
    assert same(found, wanted)
    assert same(fixed.add(held, x), wanted)
    assert seen == ["_combine"]
