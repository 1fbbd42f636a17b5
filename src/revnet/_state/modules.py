"""Keywords, attributes, buffers and parameters of a step, as its call found them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from operator import is_
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from .._errors import ReversibleError
from .._torch import is_dtensor, storage_id
from . import fsdp
from .branch import MACHINERY, attributes_of, modules_of
from .objects import ATOMS, Container, Copies, Large, Objects, refill, stands_for
from .tensors import TensorState, replacements
from .undo import Undo

# Stands for an attribute that a module does not have.
_ABSENT: Any = object()


class _Owner(NamedTuple):
    """One dict that the step reads, such as the attributes or the buffers of a module."""

    own: dict[str, Any]
    found: dict[str, Any]
    # Whether nothing in it is a container or a tensor.
    plain: bool
    # Whether torch keeps its own things there, too.
    is_module: bool
    size: int

    def changed(self) -> bool:
        """Check whether something in the dict is not what was found."""
        own, found = self.own, self.found
        if len(own) != self.size:
            return True
        if all(map(is_, map(own.get, found), found.values())):
            return False
        return self.plain or not all(
            stands_for(value, own.get(name, _ABSENT)) for name, value in found.items()
        )


class ModuleState:
    """What the modules of a step and its keywords hold, as a call found them.

    A replay finds the same, in copies where somebody changed it, and leaves no trace.

    Args:
        fn: the branch.
        coupling: the rule of the step, a module as well.
        kwargs: the keywords.
        where: what errors call the step.
    """

    __slots__ = (
        "modules",
        "objects",
        "owners",
        "written",
        "kwargs",
        "parameters",
        "versions",
        "flags",
        "lazy",
    )

    def __init__(
        self, fn: nn.Module, coupling: nn.Module, kwargs: Mapping[str, Any], where: str
    ) -> None:
        self.modules = modules_of(fn, coupling)
        self.objects = objects = Objects()
        self.owners: list[_Owner] = []
        # Of these, the places of those in which the call set something: a replay would set it too.
        self.written: set[int] = set()
        parameters: list[tuple[dict[str, Any], str, Tensor]] = []
        owners = self.owners
        for module in self.modules:
            own = module.__dict__
            found = attributes_of(module)
            plain = ATOMS.issuperset(map(type, found.values()))
            if not plain:
                found = {name: objects.take(value) for name, value in found.items()}
            owners.append(_Owner(own, found, plain, True, len(own)))
            if buffers := own["_buffers"]:
                # A module in evaluation mode writes to none, as a rule.
                objects.eager = module.training
                found = {name: objects.take(value) for name, value in buffers.items()}
                objects.eager = True
                owners.append(_Owner(buffers, found, False, False, len(buffers)))
            if children := own["_modules"]:
                owners.append(_Owner(children, children.copy(), True, False, len(children)))
            if owner := own["_parameters"]:
                parameters += [(owner, name, p) for name, p in owner.items() if p is not None]
        self.parameters = parameters
        self.versions = [p._version for _, _, p in parameters]
        self.flags = [p.requires_grad for _, _, p in parameters]
        self.lazy = any([p.__class__ is UninitializedParameter for _, _, p in parameters])
        self.kwargs: dict[str, Any] = self._keywords(kwargs, where) if kwargs else {}

    def _keywords(self, kwargs: Mapping[str, Any], where: str) -> dict[str, Any]:
        found = {}
        for name, value in kwargs.items():
            try:
                found[name] = self.objects.take(value, keyword=True)
            except TypeError as error:
                raise ReversibleError(
                    f"{where}: keyword {name!r} holds a {error}, of which no copy can be made for "
                    "the replay. Pass a tensor, list, tuple, dict, set or dataclass."
                ) from None
        return found

    def passing(self) -> set[int]:
        """Return the memory of tensors that backward takes from the graph: they are not recomputed.

        Of keywords all are, of attributes those that take a gradient.
        """
        return {
            storage_id(state.tensor)
            for state in self.objects.tensors.values()
            if state.keyword or state.tensor.requires_grad
        }

    def settle(self) -> None:
        """Note what the call changed."""
        self.written = {place for place, owner in enumerate(self.owners) if owner.changed()}
        if self.lazy:
            # A lazy module gives its parameters memory in its first call.
            self.versions = [parameter._version for _, _, parameter in self.parameters]
        objects = self.objects
        if objects.tensors or objects.containers:
            objects.settle(self._values())

    def _values(self) -> Iterator[tuple[Any, Any]]:
        """Go through what was found, and what is in its place now."""
        for owner in self.owners:
            if not owner.plain:
                for name, value in owner.found.items():
                    yield value, owner.own.get(name)

    def check(self, where: str) -> None:
        """Raise where a tensor was changed in place since, which no replay can undo.

        Raises:
            ReversibleError: a parameter, a keyword tensor, or a tensor of a module that the call
                left alone; or a container that is too large to be copied.
        """
        present = [parameter._version for _, _, parameter in self.parameters]
        for (owner, name, parameter), now, version in (
            zip(self.parameters, present, self.versions, strict=True)
            if present != self.versions
            else ()
        ):
            if now == version:
                continue
            exchanged = fsdp.exchanged(parameter, owner.get(name))
            if not isinstance(parameter, nn.Parameter) or is_dtensor(parameter) or not exchanged:
                raise ReversibleError(_changed(where, "parameter", name) + _INITIALISED)
        for state in self.objects.tensors.values():
            if state.changed():
                raise ReversibleError(_changed(where, *self._label(state)))
        for large in self.objects.large.values():
            if not large.same():
                raise ReversibleError(
                    f"{where}: a {type(large.original).__name__} of {large.length} items, too many "
                    "to be copied in each call, has another number of them now. Call backward "
                    "before it changes, or keep what changes in smaller containers."
                )

    def _label(self, state: TensorState) -> tuple[str, str]:
        """Return what kind of tensor this is, and its name."""
        parts: tuple[Any, ...] = (state, *self.objects.containing([state]))
        for name, value in self.kwargs.items():
            if any(value is part for part in parts):
                return "keyword tensor", name
        buffers = {id(module._buffers) for module in self.modules}
        for owner in self.owners:
            for name, value in owner.found.items():
                if any(value is part for part in parts):
                    return "buffer" if id(owner.own) in buffers else "attribute", name
        return "attribute", "of a container"

    def restore(self, undo: Undo) -> dict[str, Any]:
        """Put the modules into the state that the call found, until `undo` runs.

        Returns:
            The keywords for the replay.
        """
        objects = self.objects
        replaced = replacements(objects.tensors.values()) if objects.tensors else {}
        originals = objects.locate(self._values()) if objects.containers else {}
        copies = Copies(objects, replaced, originals)
        clean = []
        for place, owner in enumerate(self.owners):
            changed = owner.changed()
            if not changed and place not in self.written and not copies.any():
                clean.append(owner)
                continue
            changes = self._changes(owner, copies)
            if not changed and not changes and place not in self.written:
                clean.append(owner)
                continue
            undo.add(partial(_reset, owner.own, owner.own.copy()))
            for name in _extra(owner):
                del owner.own[name]
            owner.own.update(changes)
        undo.add(partial(_repair, undo, clean, objects, copies.originals))
        self._restore_parameters(undo)
        return {name: copies.make(value) for name, value in self.kwargs.items()}

    def _changes(self, owner: _Owner, copies: Copies) -> dict[str, Any]:
        """Return what has to be put into a dict."""
        changes = {}
        own = owner.own
        for name, value in owner.found.items():
            present = own.get(name, _ABSENT)
            if present is value:
                continue
            if owner.plain:
                changes[name] = value
            elif not stands_for(value, present) or copies.replaces(value):
                changes[name] = copies.make(value)
        return changes

    def _restore_parameters(self, undo: Undo) -> None:
        present = [owner.get(name) for owner, name, _ in self.parameters]
        flags = [parameter.requires_grad for _, _, parameter in self.parameters]
        same = all(p is found for p, (_, _, found) in zip(present, self.parameters, strict=True))
        if same and flags == self.flags:
            return
        for (owner, name, parameter), now, flag in zip(
            self.parameters, present, self.flags, strict=True
        ):
            if now is not parameter and not fsdp.exchanged(parameter, now):
                undo.add(partial(_put, owner, name, now if name in owner else _ABSENT))
                owner[name] = parameter
            if parameter.requires_grad is not flag and parameter.is_leaf:
                undo.add(partial(parameter.requires_grad_, not flag))
                parameter.requires_grad_(flag)


def _extra(owner: _Owner) -> set[str]:
    """Return the names that were not found."""
    extra = owner.own.keys() - owner.found.keys()
    return extra - MACHINERY if owner.is_module else extra


def _put(owner: dict[str, Any], name: str, value: Any) -> None:
    if value is _ABSENT:
        owner.pop(name, None)
    else:
        owner[name] = value


def _reset(own: dict[str, Any], before: dict[str, Any]) -> None:
    for name in own.keys() - before.keys():
        del own[name]
    own.update(before)


def _repair(undo: Undo, clean: list[_Owner], objects: Objects, originals: dict[int, Any]) -> None:
    """Restore what a replay left behind that ended midway: the call itself left no trace there."""
    if undo.finished:
        return
    for owner in clean:
        own = owner.own
        if not owner.changed():
            continue
        for name in _extra(owner):
            del own[name]
        for name, value in owner.found.items():
            if value.__class__ is Container:
                own[name] = originals[id(value)]
            elif value.__class__ is TensorState or value.__class__ is Large:
                own[name] = value.original
            else:
                own[name] = value
    for container in objects.containers.values():
        if id(container) in originals:
            refill(container, originals)


_INITIALISED = (
    " If the branch itself initialises it in its first call, run one forward pass under "
    "torch.no_grad() first."
)


def _changed(where: str, kind: str, name: str) -> str:
    return (
        f"{where}: {kind} {name!r} was changed in place between forward and backward, so the "
        "forward pass cannot be replayed. Call backward before the optimizer's step (or any other "
        "in-place write)."
    )
