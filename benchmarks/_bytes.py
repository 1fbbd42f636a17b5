"""Bytes that a token takes in the networks of benchmarks/long_context.py, by arithmetic.

All per token and element of the width, in bfloat16. `groups` of the heads, of which `shared` heads
of keys and values per head of queries. docs/long_context.md has the parts one by one.
"""

from __future__ import annotations


def reversible(streams: str, groups: int, shared: float) -> float:
    """Return the bytes at the peak, whatever the depth: while a step is undone, or in attention."""
    held = 12 if streams == "fixed" else 4
    return max(held + 12 + (6 + 6 * shared) / groups, held + 8 + (10 + 10 * shared) / groups)


def checkpointed(depth: int, groups: int, shared: float) -> float:
    """Return the bytes at the peak with the inputs of `depth` layers kept, in attention's backward.

    Beside them there are the gradient of the layer's output, that of its input so far, and what a
    group keeps: its norm, and what attention works on. With less than four groups less.
    """
    return 2 * depth + 6 + (10 + 10 * shared) / groups


def offloaded(groups: int, shared: float) -> float:
    """Return the bytes on the device where the inputs of layers come from the host one by one."""
    return checkpointed(1, groups, shared)


def hosted(depth: int) -> int:
    """Return the bytes in host memory of an offloaded network."""
    return 2 * depth


def stored(depth: int, shared: float, hidden: float) -> float:
    """Return the bytes at the end of the forward pass, where every layer keeps what it saves.

    The heads are one group. A layer keeps its input, two norms and what the second one reads;
    queries, keys and values, and the rotated ones; the mix, as attention and as the projection
    have it; and of the MLP, whose hidden size is `hidden` widths, two halves, the activated one
    and the product.
    """
    layer = 4 * 2 + (4 + 6 * shared) + 4 + 4 * 2 * hidden
    # And the hidden states before the loss, and their gradient.
    return depth * layer + 4
