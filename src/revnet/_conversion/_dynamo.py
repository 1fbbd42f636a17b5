"""What conversion relies on in torch.compile: names in torch._C, so that nothing loads.

A compiled model breaks its graph at a converted layer (`_torchdynamo_disable`), whose `forward` is
not compiled itself (`set_code_exec_strategy`). Inside, the compiler is switched off
(`set_eval_frame`), and on again for the layer's own computation, in forward and in replays.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch._C._dynamo import eval_frame

# The oldest and the newest torch with these names; see tests/test_convert_ecosystem.py.
VERSIONS = "2.11", "2.15"


def keep_out(function: Callable[..., Any]) -> None:
    """Have compilers call this function instead of looking into it."""
    try:
        action = eval_frame._FrameAction
        skip = eval_frame._FrameExecStrategy(action.SKIP, action.DEFAULT)
        eval_frame.set_code_exec_strategy(function.__code__, skip)
    except AttributeError:
        # Another version keeps them elsewhere. This import takes a second.
        from torch._dynamo.eval_frame import skip_code

        skip_code(function.__code__)
    vars(function)["_torchdynamo_disable"] = True
    vars(function)["_torchdynamo_disable_msg"] = "a layer converted by revnet"


# Set the compiler that is at work (None: none); returns the one before. A function in C, called
# without a context manager: a compiler with `fullgraph=True` would look into that, and raise.
set_compiler: Callable[[Any], Any] = eval_frame.set_eval_frame
