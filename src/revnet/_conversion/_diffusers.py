"""What conversion relies on in diffusers: a name, of which nothing is imported here.

Classes called UNet..., whose blocks hand on a skip connection each.
"""

from __future__ import annotations

from torch import nn

# The oldest and the newest version with it; see tests/test_convert_ecosystem.py.
VERSIONS = "0.35", "0.42"


def is_unet(model: nn.Module) -> bool:
    """Check whether a model is a U-Net, of which no stack of layers can be converted."""
    kind = type(model)
    return kind.__module__.startswith("diffusers.") and kind.__name__.startswith("UNet")
