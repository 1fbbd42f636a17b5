"""What conversion relies on in timm: a name, of which nothing is imported here.

`set_grad_checkpointing` sets the attribute `grad_checkpointing` of models and of their stages,
which then run their blocks under a checkpoint.
"""

from __future__ import annotations

from torch import nn

# The oldest and the newest version with it; see tests/test_convert_ecosystem.py.
VERSIONS = "1.0", "1.0"
FLAG = "grad_checkpointing"


def checkpoints_blocks(module: nn.Module) -> bool:
    """Check whether a module can run its blocks under a checkpoint."""
    return FLAG in vars(module)
