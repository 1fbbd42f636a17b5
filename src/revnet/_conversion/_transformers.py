"""What conversion relies on in transformers: names, of which nothing is imported here.

`GradientCheckpointingLayer` (modeling_layers), the base of layers, and its attribute
`gradient_checkpointing`, which `gradient_checkpointing_enable` and `_disable` set; `Cache`
(cache_utils) with `get_seq_length` and `has_previous_state`; `name_or_path` of a model that was
loaded.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

# The oldest and the newest version with these names; see tests/test_convert_ecosystem.py.
VERSIONS = "4.50", "5.23"
# What `gradient_checkpointing_enable` sets in layers.
FLAG_OF_LAYERS = "gradient_checkpointing"
# What layers call their caches.
_CACHE_NAMES = frozenset(
    ("past_key_values", "past_key_value", "layer_past", "cache_params", "past_bucket_states")
)


def is_layer(module: nn.Module) -> bool:
    """Check whether a module is a layer of a transformers model that it can checkpoint."""
    found = sys.modules.get("transformers.modeling_layers")
    return found is not None and isinstance(module, found.GradientCheckpointingLayer)


def is_cache(name: str, value: Any) -> bool:
    """Check whether a keyword of a layer is a key-value cache."""
    found = sys.modules.get("transformers.cache_utils")
    return (found is not None and isinstance(value, found.Cache)) or (
        name in _CACHE_NAMES and value is not None
    )


def is_empty(cache: Any) -> bool:
    """Check whether a cache holds nothing yet, so that a layer may be run without it."""
    # Some hold keys and values, some the state of a recurrence, some both.
    for name in ("get_seq_length", "has_previous_state"):
        length = getattr(cache, name, None)
        try:
            if callable(length) and int(length()) != 0:
                return False
        except (AttributeError, ValueError):
            continue
    return hasattr(cache, "get_seq_length")


def was_loaded(model: nn.Module) -> bool:
    """Check whether a model was loaded from pretrained weights."""
    return bool(getattr(model, "name_or_path", ""))
