"""Read distributed checkpoints as data: nothing in them is executed, whoever made them.

torch unpickles their metadata, and all values that are no tensors, without limits. Here both go
through unpicklers that know only the types that a checkpoint needs.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import metadata as parts
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.default_planner import (
    DefaultLoadPlanner,
    create_default_local_load_plan,
)
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.serialization import _get_layout

from revnet._files import open_file, read_file

MOST_METADATA_BYTES = 2**28
_TYPES: dict[tuple[str, str], Any] = {
    (kind.__module__, kind.__qualname__): kind
    for kind in (
        parts.BytesStorageMetadata,
        parts.ChunkStorageMetadata,
        parts.Metadata,
        parts.MetadataIndex,
        parts.StorageMeta,
        parts.TensorProperties,
        parts.TensorStorageMetadata,
        parts._MEM_FORMAT_ENCODING,
        _StorageInfo,
        _get_layout,
    )
} | {
    ("torch", "Size"): torch.Size,
    # The folder that the checkpoint was written to, which is only a text here. Its module has
    # another name from Python 3.13 on.
    ("pathlib", "PosixPath"): PurePosixPath,
    ("pathlib", "WindowsPath"): PurePosixPath,
    ("pathlib._local", "PosixPath"): PurePosixPath,
    ("pathlib._local", "WindowsPath"): PurePosixPath,
}


# What Python writes from protocol 4 on for these types. Older ones could ask for any amount of
# memory, by the number of an entry in the table of what has been read.
_OPERATIONS = {
    "PROTO",
    "FRAME",
    "STOP",
    "MARK",
    "MEMOIZE",
    "BINGET",
    "LONG_BINGET",
    "STACK_GLOBAL",
    "REDUCE",
    "NEWOBJ",
    "BUILD",
    "NONE",
    "NEWTRUE",
    "NEWFALSE",
    "BININT",
    "BININT1",
    "BININT2",
    "LONG1",
    "SHORT_BINUNICODE",
    "BINUNICODE",
    "EMPTY_TUPLE",
    "TUPLE",
    "TUPLE1",
    "TUPLE2",
    "TUPLE3",
    "EMPTY_LIST",
    "APPEND",
    "APPENDS",
    "EMPTY_DICT",
    "SETITEM",
    "SETITEMS",
}


class _Unpickler(pickle.Unpickler):
    """Build nothing but the parts of metadata."""

    def find_class(self, module: str, name: str) -> Any:
        """Return the type of that name if metadata needs it."""
        if (module, name) in _TYPES:
            return _TYPES[module, name]
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        raise pickle.UnpicklingError(f".metadata holds {module}.{name}, which no checkpoint needs")


class CheckpointReader(FileSystemReader):
    """Read the checkpoint in a folder, as torch's own reader does, but only as data.

    Args:
        folder: The folder of one checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._folder = folder
        self._metadata: parts.Metadata | None = None

    def read_metadata(self, *args: Any, **keywords: Any) -> parts.Metadata:
        """Return what the checkpoint holds and where, after checks of every field that is used."""
        if self._metadata is None:
            self._metadata = self._read_metadata()
            self._metadata.storage_meta = parts.StorageMeta(load_id=self.load_id)
        return self._metadata

    def _read_metadata(self) -> parts.Metadata:
        content = read_file(self._folder / ".metadata", MOST_METADATA_BYTES)
        for operation, _, _ in pickletools.genops(content):
            if operation.name not in _OPERATIONS:
                raise pickle.UnpicklingError(f".metadata asks for {operation.name}")
        found = _Unpickler(io.BytesIO(content)).load()
        if not isinstance(found, parts.Metadata) or not _is_complete(found):
            raise ValueError(".metadata is not that of a checkpoint")
        sizes = self._file_sizes({info.relative_path for info in found.storage_data.values()})
        for info in found.storage_data.values():
            if info.offset + info.length > sizes[info.relative_path]:
                raise ValueError(f"{info.relative_path} is too short")
        return found

    def _file_sizes(self, names: set[str]) -> dict[str, int]:
        """Return the size of each file, all of which must be files of this folder."""
        sizes = {}
        for name in names:
            if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
                raise ValueError(f".metadata names a file {name!r} outside of the checkpoint")
            with open_file(self._folder / name) as file:
                sizes[name] = file.seek(0, io.SEEK_END)
        return sizes


def _is_complete(found: parts.Metadata) -> bool:
    """Return whether the fields that are used have their types."""
    entries, places = found.state_dict_metadata, found.storage_data
    if not isinstance(entries, dict) or not isinstance(places, dict):
        return False
    for name, entry in entries.items():
        if not isinstance(name, str) or not _is_entry(entry):
            return False
    for index, info in places.items():
        if not isinstance(index, parts.MetadataIndex) or not isinstance(info, _StorageInfo):
            return False
        numbers = info.offset, info.length
        if not isinstance(info.relative_path, str) or info.transform_descriptors:
            return False
        if not all(type(number) is int and 0 <= number < 2**62 for number in numbers):
            return False
    return True


def _is_entry(entry: object) -> bool:
    if isinstance(entry, parts.BytesStorageMetadata):
        return True
    if not isinstance(entry, parts.TensorStorageMetadata):
        return False
    if not isinstance(entry.properties, parts.TensorProperties):
        return False
    if not isinstance(entry.size, torch.Size) or not isinstance(entry.chunks, list):
        return False
    for chunk in entry.chunks:
        if not isinstance(chunk, parts.ChunkStorageMetadata):
            return False
        if not isinstance(chunk.offsets, torch.Size) or not isinstance(chunk.sizes, torch.Size):
            return False
    return True


class CheckpointPlanner(DefaultLoadPlanner):
    """Load a checkpoint into a state whose names, shapes and dtypes it must have."""

    def create_local_plan(self) -> LoadPlan:
        """Return what this rank reads."""
        assert self.metadata is not None
        saved = self.metadata.state_dict_metadata
        for name, value in self.state_dict.items():
            if name in saved:
                _check_entry(name, value, saved[name])
        return create_default_local_load_plan(self.state_dict, self.metadata)

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Take over a value that is no tensor."""
        name = str(read_item.dest_index.fqn)
        found = torch.load(value, weights_only=True)
        set_element(self.original_state_dict, self.mappings[name], found)


def _check_entry(name: str, value: object, entry: object) -> None:
    """Raise unless a checkpoint's entry is what the state needs; sizes are compared by torch."""
    if isinstance(value, Tensor) != isinstance(entry, parts.TensorStorageMetadata):
        raise ValueError(f"{name} is of another type than in this run")
    if not isinstance(entry, parts.TensorStorageMetadata):
        return
    assert isinstance(value, Tensor)
    if entry.properties.dtype != value.dtype:
        raise ValueError(f"{name} is {entry.properties.dtype}, not {value.dtype}")
    if sum(math.prod(chunk.sizes) for chunk in entry.chunks) != math.prod(entry.size):
        raise ValueError(f"{name} is incomplete")
