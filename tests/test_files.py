"""Files are written whole or not at all, through no link, and only files are read."""

from __future__ import annotations

import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from revnet._files import NotAFileError, append_to_file, open_file, read_file, replace_file

KINDS = ("folder", "pipe", "device", "link to a device")


def place(kind: str, path: Path) -> Path:
    """Put something at `path` that is no file."""
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "link to a device":
        path.symlink_to("/dev/zero")
    else:
        return Path("/dev/zero")
    return path


def write(path: Path, content: bytes) -> None:
    with replace_file(path) as file:
        file.write(content)


def test_a_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    mine, link = tmp_path / "mine", tmp_path / "link"
    mine.write_bytes(b"mine")
    link.symlink_to(mine)
    write(link, b"new")
    assert (mine.read_bytes(), link.read_bytes(), link.is_symlink()) == (b"mine", b"new", False)
    link.unlink()
    link.symlink_to(mine)
    with pytest.raises(NotAFileError, match="it is not a file"):
        append_to_file(link, b"new")
    assert mine.read_bytes() == b"mine"


def test_names_of_unfinished_files_cannot_be_known(tmp_path: Path) -> None:
    names = []
    for _ in range(2):
        with replace_file(tmp_path / "a.png"):
            names += [path.name for path in tmp_path.iterdir() if path.name != "a.png"]
    assert len(set(names)) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_two_writers_never_share_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda n: write(path, bytes([n]) * (10 if n % 2 else 100_000)), range(64)))
    found = path.read_bytes()
    assert len(found) == (10 if found[0] % 2 else 100_000)
    assert len(set(found)) == 1


def test_what_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write(path, b"old")

    def fail() -> None:
        with replace_file(path) as file:
            file.write(b"new")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert path.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o666])
def test_modes_stay(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "a"
    path.touch()
    path.chmod(mode)
    write(path, b"new")
    assert stat.S_IMODE(path.stat().st_mode) == mode


@pytest.mark.parametrize(("umask", "mode"), [(0, 0o664), (0o022, 0o644), (0o077, 0o600)])
def test_new_files_are_nobody_elses_to_write(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        write(tmp_path / "a", b"new")
        append_to_file(tmp_path / "b", b"new")
    finally:
        os.umask(before)
    assert {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in "ab"} == {mode}


@pytest.mark.parametrize("kind", KINDS)
def test_only_files_are_opened(tmp_path: Path, kind: str) -> None:
    path = place(kind, tmp_path / "a")
    with pytest.raises(NotAFileError, match="it is not a file"):
        read_file(path, 10)
    with pytest.raises(NotAFileError, match="it is not a file"):
        write(path, b"new")
    with pytest.raises((NotAFileError, IsADirectoryError)):
        append_to_file(path, b"new")


def test_files_are_read_up_to_a_size(tmp_path: Path) -> None:
    path = tmp_path / "a"
    append_to_file(path, b"0123")
    append_to_file(path, b"456789")
    link = tmp_path / "link"
    link.symlink_to(path)
    assert read_file(link, 10) == b"0123456789"
    assert read_file(link, 2**60) == b"0123456789"
    with pytest.raises(NotAFileError, match="it is larger than 9 bytes"):
        read_file(path, 9)
    with pytest.raises(NotAFileError), open_file(path, 9):
        pass
