"""Finding the stacks of residual layers in a model."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from torch import nn

from .._errors import ReversibleError
from ._diffusers import is_unet
from ._transformers import is_layer

_CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)
# How classes of residual layers are called, and classes of what surrounds them.
_LAYER = re.compile("layer|block|bottleneck|residual", re.IGNORECASE)
_AROUND = re.compile("stage|norm|embed|patch|pool|downsample|upsample|merging", re.IGNORECASE)
_OF_TORCH = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


@dataclass
class Found:
    """A container in a model, and those of its children that are layers, by name."""

    name: str
    layers: dict[str, nn.Module]
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """The names of the classes of the layers."""
        return ", ".join(dict.fromkeys(type(layer).__name__ for layer in self.layers.values()))


def find(model: nn.Module) -> list[Found]:
    """Return the outermost stacks of a model.

    Raises:
        ReversibleError: there is none.
    """
    refuse(model)
    found: list[Found] = []
    _visit("", model, found)
    found = _once(found)
    if not found:
        candidates = [
            f"{name!r} ({len(module)} × {type(next(iter(module))).__name__})"
            for name, module in model.named_modules()
            if isinstance(module, _CONTAINERS) and len(module) > 1
        ]
        among = f"such as {', '.join(candidates[:5])}" if candidates else "of which there is none"
        raise ReversibleError(
            f"{type(model).__name__} has no stack of equal residual layers that is known as one. "
            f"Name it, as in layers='model.layers': an nn.ModuleList, nn.Sequential or "
            f"nn.ModuleDict, {among}."
        )
    return found


def named(model: nn.Module, names: str | Sequence[str]) -> list[Found]:
    """Return the stacks with these names.

    Raises:
        ReversibleError: a name is not that of a container with layers.
    """
    found = []
    for name in [names] if isinstance(names, str) else names:
        try:
            module = model.get_submodule(name)
        except AttributeError:
            module = None
        if not isinstance(module, _CONTAINERS) or len(module) == 0:
            what = "not there" if module is None else f"a {type(module).__name__}"
            raise ReversibleError(
                f"layers names {name!r}, which is {what} in {type(model).__name__}: expected an "
                f"nn.ModuleList, nn.Sequential or nn.ModuleDict of layers, such as 'model.layers'."
            )
        found.append(Found(name, dict(_children(name, module))))
    return _once(found)


def _once(found: list[Found]) -> list[Found]:
    """Leave a layer that several stacks hold in the first: it has one place, whoever calls it."""
    places: dict[nn.Module, tuple[Found, str]] = {}
    for each in found:
        for name, layer in list(each.layers.items()):
            holder, first = places.setdefault(layer, (each, name))
            if holder is not each:
                each.left_out[name] = f"the same as {first}"
                del each.layers[name]
    return [each for each in found if each.layers]


def refuse(model: nn.Module) -> None:
    """Raise for models whose stacks cannot be entered layer by layer."""
    if is_unet(model):
        raise ReversibleError(
            f"{type(model).__name__}: its blocks hand on a skip connection each, which a "
            f"converted layer would return twice. Convert a transformer of diffusers, or build the "
            f"network from revnet.ReversibleSequence."
        )


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the module that `torch.compile` wrapped, or the module itself."""
    inner = module._modules.get("_orig_mod")
    return module if inner is None else inner


def _visit(name: str, module: nn.Module, found: list[Found]) -> None:
    stack = _stack(name, module) if isinstance(module, _CONTAINERS) else None
    if stack is not None:
        found.append(stack)
    for child_name, child in _children(name, module):
        if stack is None or child_name in stack.left_out:
            _visit(child_name, child, found)


def _stack(name: str, module: nn.Module) -> Found | None:
    """Return what a container holds of layers, None where it holds none."""
    children = dict(_children(name, module))
    counts = Counter(type(child) for child in children.values())
    # ALBERT calls the one layer of its list many times.
    alone = isinstance(module, nn.ModuleList) and len(children) == 1
    layers = {
        key: child
        for key, child in children.items()
        if _is_residual(child) and (alone or is_layer(child) or counts[type(child)] > 1)
    }
    if not layers:
        return None
    left_out = {
        key: f"{type(child).__name__}, unlike the other layers"
        for key, child in children.items()
        if key not in layers and any(True for _ in child.parameters())
    }
    return Found(name, layers, left_out)


def _children(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    prefix = f"{name}." if name else ""
    for key, child in module.named_children():
        inner = unwrapped(child)
        yield f"{prefix}{key}" + ("" if inner is child else "._orig_mod"), inner


def _is_residual(module: nn.Module) -> bool:
    """Check whether a module looks like a residual layer: by its class, and by what it holds."""
    kind = type(module)
    names = [k.__name__ for k in kind.__mro__ if not k.__module__.startswith("torch.nn.")]
    known = is_layer(module) or isinstance(module, _OF_TORCH)
    if not known and not any(map(_LAYER.search, names)):
        return False
    if _AROUND.search(kind.__name__):
        return False
    inside = [child for _, child in module.named_modules()][1:]
    return bool(inside) and any(True for _ in module.parameters())
