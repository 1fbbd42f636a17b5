"""The modules that a step may enter, and what of them is compared all at once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import repeat
from operator import is_
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import UninitializedParameter, is_lazy

from .._couplings import Coupling
from .._step import BoundStep, Step
from .branch import (
    ABSENT,
    MACHINERY,
    SlotTable,
    Table,
    attributes_of,
    modules_of,
    owner_of,
    scripted_tables,
    tables_of,
    unaliased,
)
from .contents import slots_of
from .objects import modules_in

# A hook that is called in another way than by itself stands in one of the tables behind the first.
_HOOKS = (
    ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
    ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
)


class Structure:
    """The modules of a step, and of their dicts those that hold no containers and no tensors.

    Most hold nothing but numbers, modules and parameters: they are compared all at once, and read
    anew only where something is different.

    Args:
        fn: the branch.
        coupling: the rule of the step.
        given: modules that containers hold.
    """

    __slots__ = (
        "modules",
        "kinds",
        "known",
        "holders",
        "dicts",
        "empty",
        "sizes",
        "founds",
        "owns",
        "names",
        "values",
        "others",
        "buffered",
        "outside",
        "parameters",
        "parameter_owns",
        "parameter_names",
        "tables",
        "table_sizes",
        "held",
        "without",
        "lazy",
        "simple",
        "quiet",
        "everything",
    )

    def __init__(self, fn: nn.Module, coupling: nn.Module, given: Iterable[nn.Module] = ()) -> None:
        self.modules = modules_of(fn, coupling)
        # These, and those of which children are not looked at.
        self.known = set(self.modules)
        # Those to whose buffers other branches may write: the ones that hold the branch, and for a
        # method all of its own module.
        owner = owner_of(fn)
        self.holders = set(modules_of(owner)) if owner is not None else set()
        self.dicts: list[dict[str, Any]] = []
        self.founds: list[tuple[dict[str, Any], dict[str, Any]]] = []
        # For each name the dict that has it, and its value.
        self.owns: list[dict[str, Any]] = []
        self.names: list[str] = []
        self.values: list[Any] = []
        # Modules with other attributes, and modules with buffers.
        self.others: list[nn.Module] = []
        self.buffered: list[nn.Module] = []
        # What scripted modules hold in C++, and others in slots.
        self.outside: list[Table] = []
        self.parameters: list[Any] = []
        self.parameter_owns: list[dict[str, Any]] = []
        self.parameter_names: list[str] = []
        # Tables of parameters, and the names under which each held one, or none.
        self.tables: list[dict[str, Any]] = []
        self.held: list[dict[str, bool]] = []
        # Names without a parameter, each with its table.
        self.without: tuple[list[dict[str, Any]], list[str]] = [], []
        self._add_hidden(given)
        for module in self.modules:
            self._add(module)
        self.kinds = list(map(type, self.modules))
        self.lazy = UninitializedParameter in map(type, self.parameters)
        if not self.lazy:  # Such a module takes its hook away in the first call.
            self._add_hooks()
        # Most hold nothing, and are asked for that all at once.
        self.empty = [own for own in self.dicts if not own]
        self.dicts = [own for own in self.dicts if own]
        self.sizes = list(map(len, self.dicts))
        self.table_sizes = list(map(len, self.tables))
        # A rule that derives from this one may do more.
        self.quiet = vars(type(coupling)).get("quiet", False)
        self.everything = (
            self.owns + self.parameter_owns + self.without[0],
            self.names + self.parameter_names + self.without[1],
            self.values + self.parameters + [None] * len(self.without[0]),
        )
        # Whether there is nothing in them that is copied or watched.
        self.simple = not (self.others or self.buffered or self.outside or self.lazy)

    def _add(self, module: nn.Module) -> None:
        attributes, simple = self._add_own(module)
        if not simple:
            self._add_hidden(modules_in(attributes.values()))
        children = tables_of(module)[0]
        self._hold(children, children.copy())

    def _add_own(self, module: nn.Module) -> tuple[dict[str, Any], bool]:
        """Add what a module holds itself; return its attributes, and whether they are simple."""
        attributes, simple = attributes_of(module)
        if simple:
            self._hold(module.__dict__, attributes)
        else:
            self.others.append(module)
        _, parameters, buffers = tables_of(module)
        kind: Any = type(module)
        if slots := slots_of(kind):
            self.outside.append(SlotTable(module, slots))
        if isinstance(module, torch.jit.ScriptModule):
            self.outside += scripted_tables(module)
            self.dicts.append(buffers)
        elif buffers:
            self.buffered.append(module)
            self.dicts.append(buffers)
        else:
            self._hold(buffers, {})
        self.dicts.append(parameters)
        self.tables.append(parameters)
        self.held.append({name: x is not None for name, x in parameters.items()})
        for name, parameter in parameters.items():
            if parameter is None:
                self.without[0].append(parameters)
                self.without[1].append(name)
            else:
                self.parameters.append(unaliased(parameter))
                self.parameter_owns.append(parameters)
                self.parameter_names.append(name)
        return attributes, simple

    def _add_hidden(self, modules: Iterable[nn.Module]) -> None:
        """Add modules that attributes and keywords hold, and all within."""
        for module in modules:
            if module in self.known:
                continue
            inside = modules_of(module)
            if self.modules[0] not in inside:
                self.modules += [each for each in inside if each not in self.known]
                self.known.update(inside)
                continue
            # Of one that holds the branch, the branch may read what it holds beside children.
            self.known.add(module)
            self.holders.add(module)
            self._add_own(module)

    def _add_hooks(self) -> None:
        for module in self.modules:
            own = module.__dict__
            for name, *behind in _HOOKS:
                hooks = own.get(name)
                if hooks is None:  # A scripted module keeps its own elsewhere.
                    continue
                self._hold(hooks, hooks.copy())
                for other in behind if hooks else ():
                    self._hold(own[other], own[other].copy())

    def _hold(self, own: dict[str, Any], found: dict[str, Any]) -> None:
        self.dicts.append(own)
        self.founds.append((own, found))
        self.owns += [own] * len(found)
        self.names += found
        self.values += found.values()

    def same(self) -> bool:
        """Check that every dict holds what it held, parameters apart."""
        present = map(_get, self.owns, self.names, _ABSENCES)
        return self._sized() and all(map(is_, present, self.values))

    def current(self) -> bool:
        """Check that every dict holds what it held, parameters included."""
        owns, names, values = self.everything
        # What `_sized` returns, without a call: every step asks.
        return (
            not any(self.empty)
            and list(map(len, self.dicts)) == self.sizes
            and all(map(is_, map(_get, owns, names, _ABSENCES), values))
        )

    def _sized(self) -> bool:
        return not any(self.empty) and list(map(len, self.dicts)) == self.sizes

    def made(self) -> frozenset[tuple[int, str]]:
        """Return where parameters are that were not there: the `id` of the table, and the name."""
        return frozenset(
            (id(own), name)
            for own, held in zip(self.tables, self.held, strict=True)
            for name, parameter in own.items()
            if parameter is not None and not held.get(name)
        )

    def put_back(self) -> None:
        """Put into every dict what it held, where something is different."""
        if not self.same():
            for own, found in self.founds:
                hold(own, found)


class Layers:
    """The modules that a program may enter, and which kinds of layers are among them.

    Args:
        program: the program.
    """

    __slots__ = ("kinds", "settled", "tables", "sizes", "children", "modules", "tensors", "dims")

    def __init__(self, program: nn.Module) -> None:
        modules = modules_of(program)
        known = set(modules)
        kinds: set[str] = set()
        # Whether a change of what decides shows in the tables of modules.
        self.settled = True
        self.tables: list[dict[str, Any]] = []
        # For each child, and each parameter and buffer, the table that has it and its name there.
        self.children: list[tuple[dict[str, Any], str]] = []
        self.tensors: list[tuple[dict[str, Any], str]] = []
        for module in modules:
            attributes, simple = attributes_of(module)
            for hidden in () if simple else modules_in(attributes.values()):
                # A list, say, that holds another one next time.
                self.settled = False
                inside = modules_of(hidden)
                # Of one that holds the program, its branches may read attributes.
                if program not in inside:
                    modules += [each for each in inside if each not in known]
                    known.update(inside)
            kinds.add(_kind(module))
            if isinstance(module, torch.jit.ScriptModule):
                # Its tables are copies.
                self.settled = False
                continue
            children, *tensors = tables_of(module)
            self.tables += (children, *tensors)
            self.children += [(children, name) for name in children]
            self.tensors += [(table, name) for table in tensors for name in table]
            # Of one without a shape the number of dimensions is not known.
            if any(is_lazy(tensor) for table in tensors for tensor in table.values()):
                self.settled = False
        self.sizes = list(map(len, self.tables))
        self.modules = [table[name] for table, name in self.children]
        self.dims = self._dims() if self.settled else []
        # Of "conv" and "rnn" those that are there.
        self.kinds = tuple(sorted(kinds - {""}))

    def current(self) -> bool:
        """Check that every module has the children that it had, and tensors as it had them."""
        return (
            self.settled
            and list(map(len, self.tables)) == self.sizes
            and [table.get(name, ABSENT) for table, name in self.children] == self.modules
            and self._dims() == self.dims
        )

    def _dims(self) -> list[int]:
        """Return the dimensions of each tensor: not itself, as that would keep its memory."""
        tensors = [table.get(name, ABSENT) for table, name in self.tensors]
        # In one line: calls would cost as many as there are tensors.
        return [-1 if x is None else -2 if x is ABSENT else x.ndim for x in tensors]


def _is_wide(tensor: Any) -> bool:
    """Check whether a tensor may be the weight of a convolution; a mask is not."""
    if tensor is None or tensor.dtype is torch.bool:
        return False
    # Of one without a shape yet that is not known.
    return is_lazy(tensor) or tensor.dim() > 2


def _kind(module: nn.Module) -> str:
    """Return "conv" or "rnn" for a layer that torch computes by the settings of this kind."""
    _, parameters, buffers = tables_of(module)
    # Scripts have lost their class, and a branch may call `conv2d` with weights of its own.
    if isinstance(module, nn.RNNBase) or "weight_ih_l0" in parameters:
        return "rnn"
    wide = any(map(_is_wide, (*parameters.values(), *buffers.values())))
    return "conv" if wide or isinstance(module, _ConvNd) else ""


class Memory:
    """What earlier calls of the steps of a program found, by the number of the step.

    It belongs to one program: a copy of that starts with none.
    """

    def __init__(self) -> None:
        self._structures: dict[Any, tuple[nn.Module, nn.Module, Structure]] = {}
        # In one tuple, as another thread may read it between two assignments.
        self._bound: tuple[list[Any], list[tuple[int, BoundStep]]] = [], []
        self._layers: Layers | None = None

    def steps(self, branches: Sequence[Any]) -> Sequence[tuple[int, BoundStep]] | None:
        """Return the steps of the last call without keywords if it had these very branches."""
        known, steps = self._bound
        return steps if len(branches) == len(known) and all(map(is_, branches, known)) else None

    def keep_steps(self, branches: Sequence[Any], steps: Sequence[tuple[int, BoundStep]]) -> None:
        """Keep the steps of a call without keywords."""
        # Constants of a `Step` may change.
        if not any(isinstance(branch, Step) for branch in branches):
            self._bound = list(branches), list(steps)

    def forget(self) -> None:
        """Let go of all modules."""
        self._structures, self._bound, self._layers = {}, ([], []), None

    def layers(self, program: nn.Module) -> Layers:
        """Return the layers of the program, read anew where its modules have changed."""
        layers = self._layers
        if layers is None or not layers.current():
            layers = self._layers = Layers(program)
        return layers

    def __reduce__(self) -> Any:
        return Memory, ()

    def structure(
        self,
        number: Any,
        fn: nn.Module,
        coupling: Coupling,
        given: Iterable[nn.Module] = (),
    ) -> Structure:
        """Return the structure of a step, read anew where it has changed.

        Args:
            number: of the step.
            fn: the branch.
            coupling: the rule.
            given: modules that containers hold, where the structure lacks one.
        """
        known = None if given else self._structures.get(number)
        # A rule made for a single call, such as an inverse, has the modules of another.
        if (
            known is not None
            and known[0] is fn
            and (known[1] is coupling or known[1] is coupling.state_owner)
        ):
            structure = known[2]
            if structure.current() and list(map(type, structure.modules)) == structure.kinds:
                return structure
        owner = coupling.state_owner
        structure = Structure(fn, owner, given)
        # The weights of `functional_call` are no parameters: kept here, they would stay until the
        # next call.
        if all(isinstance(each, nn.Parameter) for each in structure.parameters):
            self._structures[number] = fn, owner, structure
        return structure


_get, _ABSENCES = dict.get, repeat(ABSENT)


def hold(own: Table, wanted: dict[str, Any], machinery: frozenset[str] = MACHINERY) -> None:
    """Let a dict hold this and nothing else, but for what torch keeps there for itself."""
    for name in own.keys() - wanted.keys() - machinery:
        del own[name]
    own.update(wanted)
    if isinstance(own, dict) and "_modules" not in own and list(own) != list(wanted):
        # Children and hooks run in their order. That of attributes is no matter, nor has what a
        # script holds any other.
        own.clear()
        own.update(wanted)
