"""Keywords, attributes, buffers and parameters of a step, as its call found them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import repeat
from operator import attrgetter, is_
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import UninitializedParameter

from .._errors import ReversibleError, changed_message
from .._torch import is_dtensor, storage_id
from . import fsdp
from .branch import ABSENT, Table, attributes_of, own_class, unaliased
from .copies import Copies, refill
from .objects import Container, Large, Objects, stands_for
from .structure import Structure, hold
from .tensors import TensorState, replacements
from .undo import Undo


class _Owner:
    """A dict that holds containers or tensors: attributes or buffers of a module."""

    __slots__ = ("own", "found", "size", "_names", "_values", "_others")

    def __init__(self, own: Table, found: dict[str, Any]) -> None:
        self.own = own
        self.found = found
        self.size = len(own)
        # Compared by identity, all at once.
        self._names: list[str] = []
        self._values: list[Any] = []
        self._others: list[tuple[str, Any]] = []
        for name, value in found.items():
            if value.__class__ is TensorState and not value.attached:
                value = value.tensor
            elif value.__class__ in (Container, Large, TensorState):
                self._others.append((name, value))
                continue
            self._names.append(name)
            self._values.append(value)

    def changed(self) -> bool:
        """Check whether something in the dict is not what was found."""
        own = self.own
        present = map(own.get, self._names, repeat(ABSENT))
        if len(own) != self.size or not all(map(is_, present, self._values)):
            return True
        return not all(stands_for(value, own.get(name)) for name, value in self._others)


class ModuleState:
    """What the modules of a step and its keywords hold, as a call found them.

    A replay finds the same, in copies where somebody changed it, and leaves no trace.

    Args:
        structure: of the step.
        kwargs: the keywords.
        where: what errors call the step.
    """

    __slots__ = ("structure", "objects", "owners", "kwargs", "marks", "made", "lazy")

    def __init__(self, structure: Structure, kwargs: Mapping[str, Any], where: str) -> None:
        self.structure = structure
        self.owners: list[_Owner] = []
        self.marks = _marks(structure.parameters)
        # Where the call itself put parameters: a replay goes on with them.
        self.made: frozenset[tuple[int, str]] = frozenset()
        self.lazy = structure.lazy and UninitializedParameter in map(type, structure.parameters)
        if structure.simple and not kwargs:
            self.objects, self.kwargs = _NOTHING, _NO_KEYWORDS
            return
        self.objects = objects = Objects()
        for module in structure.others:
            found = objects.take_all(attributes_of(module)[0])
            self.owners.append(_Owner(module.__dict__, found))
        for module in structure.buffered:
            # A module in evaluation mode writes to none, as a rule.
            objects.eager = module.training
            buffers = module._buffers
            found = objects.take_all(buffers)
            self.owners.append(_Owner(buffers, found))
            if module in structure.holders:
                for state in found.values():
                    if state.__class__ is TensorState:
                        state.elsewhere = True
        objects.eager = True
        for table in structure.outside:
            self.owners.append(_Owner(table, objects.take_all(table.copy())))
        self.kwargs = self._keywords(kwargs, where)

    @property
    def modules(self) -> list[nn.Module]:
        """Every distinct module that the step may enter."""
        return self.structure.modules

    def strangers(self) -> list[nn.Module]:
        """Return the modules that containers hold now and the structure lacks, as they were."""
        known = self.structure.known
        return [module for module in self.objects.modules if module not in known]

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
        self.made = self.structure.made()
        objects = self.objects
        if objects is _NOTHING:
            return
        if self.lazy:
            # A lazy module gives its parameters memory in its first call.
            marks = zip(_marks(self.structure.parameters), self.marks, strict=True)
            self.marks = [(version, flag) for (version, _), (_, flag) in marks]
        if objects.tensors or objects.containers or objects.iterations:
            objects.settle(self._values())

    def _values(self) -> Iterator[tuple[Any, Any]]:
        """Go through what was found, and what is in its place now."""
        for owner in self.owners:
            for name, value in owner.found.items():
                yield value, owner.own.get(name)

    def check(self, where: str) -> None:
        """Raise where a tensor was changed in place since, which no replay can undo.

        Raises:
            ReversibleError: a parameter, a keyword tensor, or a tensor of a module that the call
                left alone; a container that is too large to be copied; or a module that has
                another class.
        """
        if list(map(type, self.structure.modules)) != self.structure.kinds:
            self._check_kinds(where)
        if _marks(self.structure.parameters) != self.marks:
            self._check_parameters(where)
        for state in self.objects.tensors.values():
            if state.changed():
                raise ReversibleError(changed_message(where, *self._label(state)))
        for large in self.objects.large.values():
            if not large.same():
                raise ReversibleError(
                    f"{where}: a {type(large.original).__name__} of {large.length} items, too many "
                    "to be copied in each call, has another number of them now. Call backward "
                    "before it changes, or keep what changes in smaller containers."
                )

    def _check_kinds(self, where: str) -> None:
        for module, kind in zip(self.structure.modules, self.structure.kinds, strict=True):
            # A lazy module takes its own class in its first call, and `unconvert` gives it back.
            same = own_class(type(module)) is own_class(kind)
            if not same and not issubclass(kind, LazyModuleMixin):
                raise ReversibleError(
                    f"{where}: a module of class {kind.__name__} has class {type(module).__name__} "
                    "now, so the forward pass cannot be replayed. Call backward before what "
                    "changes it, such as registering or removing a parametrization."
                )

    def _check_parameters(self, where: str) -> None:
        structure = self.structure
        places = zip(structure.parameter_owns, structure.parameter_names, strict=True)
        for (own, name), parameter, (version, _) in zip(
            places, structure.parameters, self.marks, strict=True
        ):
            if parameter._version == version:
                continue
            exchanged = fsdp.exchanged(parameter, own.get(name))
            if not isinstance(parameter, nn.Parameter) or is_dtensor(parameter) or not exchanged:
                raise ReversibleError(changed_message(where, "parameter", name) + _INITIALISED)

    def _label(self, state: TensorState) -> tuple[str, str]:
        """Return what kind of tensor this is, and its name."""
        parts: tuple[Any, ...] = (state, *self.objects.containing([state]))
        for name, value in self.kwargs.items():
            if any(value is part for part in parts):
                return "keyword tensor", name
        buffers = {id(module._buffers) for module in self.structure.buffered}
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
        structure = self.structure
        current = structure.current()
        if current or structure.same():
            undo.add(structure.put_back)
        else:
            undo.add(partial(_reset, [(own, own.copy()) for own, _ in structure.founds]))
            for own, found in structure.founds:
                hold(own, found)
        if not current:
            self._restore_parameters(undo)
        if _marks(structure.parameters) != self.marks:
            flags = [flag for _, flag in self.marks]
            _restore_flags(zip(structure.parameters, flags, strict=True), undo)
        objects = self.objects
        if objects is _NOTHING:
            return {}
        _restore_flags(((state.tensor, state.flag) for state in objects.tensors.values()), undo)
        replaced = replacements(objects.tensors.values()) if objects.tensors else {}
        originals = objects.locate(self._values()) if objects.containers else {}
        for whole in objects.wholes.values():
            whole.restore(undo)
        copies = Copies(objects, replaced, originals)
        undo.add(copies.free)
        if self.owners:
            self._restore_owners(copies, undo)
        return {name: copies.make(value) for name, value in self.kwargs.items()}

    def _restore_owners(self, copies: Copies, undo: Undo) -> None:
        unchanged = []
        for owner in self.owners:
            if not owner.changed() and not any(map(copies.replaces, owner.found.values())):
                unchanged.append(owner)
                continue
            undo.add(partial(_reset, [(owner.own, owner.own.copy())]))
            made = {}
            for name, value in owner.found.items():
                present = owner.own.get(name, ABSENT)
                # A tensor with a graph stays where it is.
                kept = stands_for(value, present) and not copies.replaces(value)
                made[name] = present if kept else copies.make(value)
            hold(owner.own, made)
        undo.add(partial(_put_back, unchanged, self.objects, copies.originals))

    def _restore_parameters(self, undo: Undo) -> None:
        structure = self.structure
        places = zip(structure.parameter_owns, structure.parameter_names, strict=True)
        for (own, name), parameter in zip(places, structure.parameters, strict=True):
            present = own.get(name, ABSENT)
            # An alias is there while a tile runs, in another thread perhaps, which takes it away.
            aliased = unaliased(present) is parameter
            if not aliased and not fsdp.exchanged(parameter, present):
                undo.add(partial(_put, own, name, present))
                own[name] = parameter
        self._restore_tables(undo)

    def _restore_tables(self, undo: Undo) -> None:
        """Leave in the tables of parameters the names that were there or that the call made."""
        for own, held in zip(self.structure.tables, self.structure.held, strict=True):
            wanted = dict.fromkeys(held) | {
                name: parameter
                for name, parameter in own.items()
                if held.get(name) or (id(own), name) in self.made
            }
            present = map(own.get, wanted, repeat(ABSENT))
            if len(own) != len(wanted) or not all(map(is_, present, wanted.values())):
                undo.add(partial(_reset, [(own, own.copy())]))
                hold(own, wanted, frozenset())


def _restore_flags(flags: Iterable[tuple[Tensor, bool]], undo: Undo) -> None:
    """Let each tensor take a gradient where it did, and nowhere else."""
    for tensor, flag in flags:
        if tensor.requires_grad is not flag and tensor.is_leaf:
            undo.add(partial(tensor.requires_grad_, not flag))
            tensor.requires_grad_(flag)


# Of a step without keywords whose modules hold nothing but numbers and parameters.
_NOTHING = Objects()
_NO_KEYWORDS: dict[str, Any] = {}


def _marks(parameters: list[Any]) -> list[tuple[int, bool]]:
    """Return what changes where somebody writes to a parameter, freezes it or thaws it."""
    return list(map(_mark, parameters))


_mark: Any = attrgetter("_version", "requires_grad")


def _reset(dicts: Sequence[tuple[Table, dict[str, Any]]]) -> None:
    for own, before in dicts:
        hold(own, before, frozenset())


def _put(own: dict[str, Any], name: str, value: Any) -> None:
    if value is ABSENT:
        own.pop(name, None)
    else:
        own[name] = value


def _put_back(owners: list[_Owner], objects: Objects, originals: dict[int, Any]) -> None:
    """Take back what a replay did to dicts and containers that were as the call found them."""
    for owner in owners:
        if owner.changed():
            found = {name: _present(value, originals) for name, value in owner.found.items()}
            hold(owner.own, found)
    if originals:
        for container in objects.containers.values():
            if id(container) in originals:
                refill(container, originals)


def _present(value: Any, originals: dict[int, Any]) -> Any:
    if value.__class__ is Container:
        return originals[id(value)]
    return value.original if value.__class__ in (TensorState, Large) else value


_INITIALISED = (
    " If the branch itself initialises it in its first call, run one forward pass under "
    "torch.no_grad() first."
)
