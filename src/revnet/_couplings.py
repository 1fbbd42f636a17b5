"""Rules by which a branch's output updates a stream, each with its inverse."""

from __future__ import annotations

import math
from fractions import Fraction
from numbers import Real
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ._factors import (
    Increment,
    divided,
    multiplied,
    number,
    ratio_of,
    signed,
    times,
)
from ._trees import tree_map


class Coupling(nn.Module):
    """Update the target stream of a step with the output of its branch, and undo that.

    A rule of the form `scale(out) · target + increment(out)` overrides `increment`, and where the
    scale is not one, `scale` and `least_scale`. Such a rule is exact in fixed streams. Any other
    rule overrides `combine` and `invert`, with `invert(combine(target, out), out) == target`.

    Float streams undo without being told only what adds to the target (`scale` left alone) or moves
    its elements (`rearranges`): dividing by a scale multiplies rounding errors, at depth 256 by
    more than any format has digits. Where a rule cannot be undone in the arithmetic of the call,
    its steps keep their targets instead. Gradients are right either way.

    `target` is the stream, a tensor or a tree of tensors; `out` is what the branch returned, the
    same in forward and inverse. A rule raises `TypeError` or `ValueError` where they do not fit;
    the message goes on from "step 3".

    Args:
        approximate: undo the rule in float streams although rounding errors grow;
            `revnet.testing.check_inverse` measures by how much.

    Example:
        >>> class Damped(Coupling):
        ...     least_scale = Fraction(1, 2)
        ...     def scale(self, out): return self.least_scale
        ...     def increment(self, out): return out.tanh()
    """

    # The smallest value of `scale`, or the scale itself as a Fraction where it is constant. None:
    # fixed streams cannot bound what they must remember, and keep the target.
    least_scale: float | Fraction | None = None
    # The largest value of `scale`, where it is not constant. None: in fixed streams the inverse
    # pass keeps the target.
    greatest_scale: float | None = None
    # Whether `combine` and `invert` only move elements: they then apply to integers as to floats,
    # and are exact.
    rearranges = False
    # Whether the rule reads the source of its step, too: `scale` and `increment` then take
    # `(out, source)`, `combine` and `invert` take `(target, out, source)`. Several sources are a
    # tuple.
    reads_source = False
    # Whether a sequence with this rule starts at rest, and ends with its second stream.
    starts_at_rest = False
    # Whether rules of this very class neither draw random numbers nor remember decisions, so that
    # nothing is recorded around them.
    quiet = False
    # Of each class of rules. Whether it multiplies the target; whether it has the form `scale(out)
    # · target + increment(out)`; whether it adds to the target something that does not depend on
    # it.
    scales = False
    linear = True
    translates = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.scales = cls.scale is not Coupling.scale
        cls.linear = cls.combine is Coupling.combine and cls.invert is Coupling.invert
        cls.translates = cls.linear and not cls.scales

    def __init__(self, *, approximate: bool = False) -> None:
        super().__init__()
        self.approximate = approximate

    @property
    def state_owner(self) -> Coupling:
        """Return the module that holds the state of this rule: of an adapter, the rule in it."""
        return self

    @property
    def forgets(self) -> bool:
        """Return whether the result does not depend on the target, so that there is no inverse."""
        return False

    @property
    def first(self) -> Coupling:
        """Return the rule of the first step of a sequence that starts at rest."""
        return self

    @property
    def drift(self) -> Coupling | None:
        """Return the rule that adds stream 0 to stream 1 after each branch, where it is a velocity.

        None where branches update the two streams in turn.
        """
        return None

    def sign(self, out: Any) -> Tensor | None:
        """Return 1 or -1 for each sample, (batch,), which multiplies the target; None for none."""
        return None

    def receive(self, out: Any) -> Any:
        """Return the branch's output as a `Step` hands it on: `out`, or `(out, aux)`."""
        return out

    def scale(self, out: Any) -> Any:
        """Return what the target is multiplied by.

        A `Fraction`, or positive factors in the structure of the target.
        """
        return Fraction(1)

    def increment(self, out: Any) -> Any:
        """Return what is added to the target.

        In the structure, shapes and device of the target, of any floating dtype.
        """
        raise NotImplementedError(
            f"{type(self).__name__} defines neither `increment` nor `combine` and `invert`"
        )

    def factored(self, out: Any) -> Increment:
        """Return the factors of `increment(out)`, which fixed streams multiply where they add."""
        return Increment(self.increment(out))

    def combine(self, target: Any, out: Any) -> Any:
        """Return the target after the step."""
        increment = fitting(target, self.increment(out))
        target = signed(target, self.sign(out))
        if self.scales:
            target = multiplied(target, self.scale(out))
        return tree_map(_add, target, increment)

    def invert(self, target: Any, out: Any) -> Any:
        """Return the target before the step, from the target after it."""
        target = tree_map(_subtract, target, self.increment(out))
        target = divided(target, self.scale(out)) if self.scales else target
        return signed(target, self.sign(out))

    @property
    def bits_per_step(self) -> float:
        """Return how many bits per element fixed streams remember, at most, to undo one step."""
        return -math.log2(self.least_scale) if self.least_scale else 0.0

    def extra_repr(self) -> str:
        return "approximate=True" if self.approximate else ""


class Additive(Coupling):
    """Compute `y = x + f`, undone by `x = y - f`.

    Reference: Dinh et al. 2014, arXiv:1410.8516; Gomez et al. 2017, arXiv:1707.04585.
    """

    quiet = True

    def increment(self, out: Any) -> Any:
        return out


ADDITIVE = Additive()


class _Scheme(Coupling):
    """Compute `y = x + multiple · h · f`."""

    multiple = 1.0

    def __init__(self, step_size: float) -> None:
        super().__init__()
        if not isinstance(step_size, float | Real):
            raise TypeError(f"{type(self).__name__}(step_size={step_size!r}): expected a number")
        if not math.isfinite(step_size):
            raise ValueError(f"{type(self).__name__}(step_size={step_size}): expected a finite one")
        self.step_size = step_size

    def increment(self, out: Any) -> Any:
        return tree_map(lambda leaf: times(leaf, self.multiple * self.step_size), out)

    def extra_repr(self) -> str:
        return f"step_size={self.step_size}"


class Midpoint(_Scheme):
    """Compute `x[n+1] = x[n-1] + 2h · f(x[n])`.

    Two streams hold `x[n-1]` and `x[n]`, and steps update them in turn.

    Args:
        step_size: h.

    Reference: Gal et al. 2025, arXiv:2512.02056.
    """

    quiet = True

    multiple = 2.0
    starts_at_rest = True

    @property
    def first(self) -> Coupling:
        """Return an Euler step, from `x[0]` in both streams."""
        return Leapfrog(self.step_size)


class Leapfrog(_Scheme):
    """Compute `v += h · f(x)`, then `x += h · v`.

    One step has the force f, one has `fn=None` and reads v.

    The same trajectory as `x[n+1] = 2 x[n] - x[n-1] + h² · f(x[n])` (Störmer and Verlet), and for a
    Hamiltonian H(x, v) = T(v) + U(x) with f = -∂U/∂x and ∂T/∂v in place of v, the symplectic
    scheme.

    Args:
        step_size: h.

    Reference: Gal et al. 2025, arXiv:2512.02056; Hairer et al. 2003, doi:10.1017/S0962492902000144.
    """

    quiet = True

    starts_at_rest = True

    @property
    def drift(self) -> Coupling:
        """Return the rule that adds h · v to the position."""
        return self


class Momentum(Coupling):
    """Compute `v = γ · v + (1 - γ) · f(x)`, followed by a step with `fn=None` that adds v to x.

    Args:
        gamma: γ, between 0 and 1: a fraction, or a decimal number of at most four digits. In fixed
            streams a step takes log2(1/γ) bits per element (0.152 for 0.9).

    Reference: Sander et al. 2021, arXiv:2102.07870; Maclaurin et al. 2015, arXiv:1502.03492.
    """

    quiet = True

    starts_at_rest = True

    def __init__(self, gamma: float | Fraction = 0.9, *, approximate: bool = False) -> None:
        super().__init__(approximate=approximate)
        self.gamma = ratio_of(gamma, "Momentum")
        if not 0 < self.gamma < 1:
            raise ValueError(f"Momentum(gamma={gamma}): expected a number between 0 and 1")
        self.least_scale = self.gamma

    @property
    def drift(self) -> Coupling:
        """Return the rule that adds v to the state."""
        return ADDITIVE

    def scale(self, out: Any) -> Fraction:
        return self.gamma

    def increment(self, out: Any) -> Any:
        return tree_map(lambda leaf: times(leaf, number(1 - self.gamma)), out)

    def factored(self, out: Any) -> Increment:
        # A subclass may have an increment of its own.
        plain = type(self) is Momentum
        return Increment(out, number(1 - self.gamma)) if plain else super().factored(out)

    def extra_repr(self) -> str:
        return f"gamma={self.gamma}"


class Affine(Coupling):
    """Compute `y = x · exp(s) + t`, undone by `x = (y - t) · exp(-s)`.

    The branch returns `(s, t)` side by side along `dim`.

    The log-scale is bounded: `s = limit · tanh(raw / limit)`. The log-determinant of the step is
    the sum of s.

    Args:
        dim: dimension along which the branch's output has twice the size of the target.
        limit: bound of the log-scale. In fixed streams a step takes at most limit / ln 2 bits per
            element.
        log_det: return the log-determinant as the step's extra output, `{"log_det": (batch,)}`,
            together with what the branch itself gave beside its output, as `"aux"`. For streams
            that are tensors.

    Reference: Dinh et al. 2017, arXiv:1605.08803; Kingma and Dhariwal 2018, arXiv:1807.03039.
    """

    quiet = True

    def __init__(
        self, dim: int = -1, *, limit: float = 2.0, log_det: bool = False, approximate: bool = False
    ) -> None:
        super().__init__(approximate=approximate)
        if not 0 < limit < math.inf:
            raise ValueError(f"Affine(limit={limit}): expected a positive bound of the log-scale")
        self.dim = dim
        self.limit = limit
        self.log_det = log_det
        self.least_scale = math.exp(-limit)
        self.greatest_scale = math.exp(limit)

    def receive(self, out: Any) -> Any:
        if not self.log_det:
            return out
        out, *aux = out if isinstance(out, tuple) else (out,)
        log_scale = self._log_scale(out)
        return out, {"log_det": log_scale.flatten(1).sum(1), **({"aux": aux[0]} if aux else {})}

    def scale(self, out: Any) -> Any:
        return tree_map(lambda leaf: self._log_scale(leaf).exp(), out)

    def increment(self, out: Any) -> Any:
        return tree_map(lambda leaf: self._halves(leaf)[1], out)

    def _log_scale(self, out: Any) -> Tensor:
        return self.limit * (self._halves(out)[0] / self.limit).tanh()

    def _halves(self, out: Any) -> tuple[Tensor, Tensor]:
        if not isinstance(out, Tensor) or out.shape[self.dim] % 2:
            raise ValueError(
                f"returned {_describe(out)}, but an affine coupling takes log-scale and shift side "
                f"by side along dimension {self.dim}: twice the size of its target there"
            )
        raw, shift = out.chunk(2, self.dim)
        return raw, shift

    def extra_repr(self) -> str:
        return f"dim={self.dim}, limit={self.limit}"


class Bijection(Coupling):
    """Compute `y = module(x)`, undone by `module.inverse(y)` or by a second module.

    The step has `fn=None`.

    To mix two streams by a matrix, three additive steps with linear branches do, which fixed
    streams undo in every bit.

    Args:
        module: maps the stream to a stream, perhaps of another shape.
        inverse: its inverse; `module.inverse` if not given.
        rearranges: the module only moves elements (a permutation, pixel-unshuffle, a reshape), and
            so acts on integers as on floats: exact in any stream.
        approximate: undo it in float streams although `inverse` rounds: right for an orthogonal
            map, which does not enlarge errors, in products of full precision (neither autocast nor
            TF32).

    Reference: Jacobsen et al. 2018, arXiv:1802.07088; Kingma and Dhariwal 2018, arXiv:1807.03039.
    """

    def __init__(
        self,
        module: nn.Module,
        inverse: nn.Module | None = None,
        *,
        rearranges: bool = False,
        approximate: bool = False,
    ) -> None:
        super().__init__(approximate=approximate)
        if inverse is None and not callable(getattr(module, "inverse", None)):
            raise TypeError(
                f"Bijection({type(module).__name__}) has no inverse: give the module a method "
                f"`inverse`, or a second module that undoes it"
            )
        self.module = module
        self.undo = inverse
        self.rearranges = rearranges

    def combine(self, target: Any, out: Any) -> Any:
        return self.module(target)

    def invert(self, target: Any, out: Any) -> Any:
        inverse: Any = self.module.inverse if self.undo is None else self.undo
        return inverse(target)


# A stream keeps its dtype: without the cast, adding a wider output would promote it. Most need
# none.


def _add(target: Tensor, increment: Tensor) -> Tensor:
    return target + (increment if increment.dtype is target.dtype else increment.to(target.dtype))


def _subtract(target: Tensor, increment: Tensor) -> Tensor:
    return target - (increment if increment.dtype is target.dtype else increment.to(target.dtype))


def fitting(target: Any, out: Any) -> Any:
    """Return `out` after a check that each of its tensors can be added to its counterpart."""
    if not isinstance(target, Tensor):
        if pytree.tree_structure(target) != pytree.tree_structure(out):
            raise ValueError(
                f"returned {_describe(out)}, but its target stream is {_describe(target)}; "
                "a branch returns a tree of the same structure"
            )
        return pytree.tree_map(fitting, target, out)
    if not isinstance(out, Tensor):
        raise TypeError(
            f"returned {type(out).__name__}, but its target stream is {_describe(target)}"
        )
    if out.shape != target.shape or out.device != target.device:
        raise ValueError(
            f"returned {_describe(out)}, but its target stream is {_describe(target)}; "
            "a branch returns a tensor of the same shape on the same device"
        )
    if not out.dtype.is_floating_point:
        raise TypeError(
            f"returned {_describe(out)}, but a stream of {target.dtype} takes floating-point "
            f"outputs"
        )
    return out


def _describe(tree: Any) -> str:
    if isinstance(tree, Tensor):
        return f"a tensor {tuple(tree.shape)} of {tree.dtype} on {tree.device}"
    return str(
        pytree.tree_map(lambda leaf: tuple(leaf.shape) if isinstance(leaf, Tensor) else leaf, tree)
    )
