"""Check that a wheel works where nothing else of the project is.

    python tests/installed_wheel.py dist

The wheel goes into an empty environment, whose only other packages are those of the interpreter
that runs this, by a .pth file: torch takes longer to install than all the rest of the checks. A
.pth file inside of a lent folder is not read, so the editable installation of the project, which is
one, stays out.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tempfile
import tomllib
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

USER = """
import torch
from torch import nn

import revnet

net = revnet.ReversibleSequence([(nn.Linear(4, 4), nn.Linear(4, 4))])
print(net(torch.randn(2, 4)).requires_grad)
print(revnet.__file__)
print(revnet.__version__)
"""
TYPED = """
# pyright: standard
import torch
from torch import nn

import revnet

net = revnet.ReversibleSequence([(nn.Linear(4, 4), nn.Linear(4, 4))])
reveal_type(net(torch.randn(2, 4)))
"""


def run(*command: str | Path, cwd: Path) -> str:
    """Return what a command prints."""
    found = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True)
    if found.returncode:
        raise SystemExit(f"{command} ended with {found.returncode}:\n{found.stdout}{found.stderr}")
    return found.stdout


def check_archive(wheel: Path) -> str:
    """Check what the wheel holds; return its version."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (name,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(name).decode())
    assert "revnet/py.typed" in names
    assert all(name.startswith(("revnet/", f"revnet-{metadata['Version']}.")) for name in names)
    extras = metadata.get_all("Provides-Extra") or []
    groups = tomllib.loads(Path("pyproject.toml").read_text())["dependency-groups"]
    assert not set(extras) & set(groups), extras
    return str(metadata["Version"])


def main(folder: Path) -> None:
    (wheel,) = folder.glob("*.whl")
    version = check_archive(wheel)
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        venv.create(place / "venv", with_pip=False)
        python = place / "venv" / "bin" / "python"
        own = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=place)
        site = Path(own.strip())
        install = ("-m", "pip", "--python", python, "install", "--quiet", "--no-deps")
        run(sys.executable, *install, wheel.absolute(), cwd=place)
        (site / "torch.pth").write_text(sysconfig.get_path("purelib") + "\n")
        user = place / "user.py"
        user.write_text(USER)
        gradient, where, found = run(python, user, cwd=place).splitlines()
        assert gradient == "True"
        assert Path(where).is_relative_to(site), where
        assert found == version, (found, version)
        typed = place / "typed.py"
        typed.write_text(TYPED)
        checker = Path(sys.executable).with_name("basedpyright")
        shown = run(checker, "--pythonpath", python, typed, cwd=place)
        assert 'Type of "net(torch.randn(2, 4))" is "Tensor"' in shown, shown
        command = python.with_name("revnet")
        assert run(command, "--version", cwd=place) == f"revnet {version}\n"
        assert "train" in run(command, "--help", cwd=place)
    print(f"{wheel.name} works in an environment of its own")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
