"""What conversion relies on in timm: names of version 1.0, nothing imported.

`set_grad_checkpointing` sets the attribute `grad_checkpointing` of models and of their stages,
which then run their blocks under a checkpoint.
"""

from __future__ import annotations

from torch import nn

FLAG = "grad_checkpointing"


def checkpoints_blocks(module: nn.Module) -> bool:
    """Check whether a module can run its blocks under a checkpoint."""
    return FLAG in vars(module)
