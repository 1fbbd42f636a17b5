"""Run the notebooks of docs/notebooks: `python docs/site/notebooks.py [--write]`.

A cell that raises ends the run with its traceback. With --write, notebooks keep what their cells
print; the site shows that.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "notebooks"


def as_markdown(path: Path) -> str:
    """Return a notebook as a page: its text, its code, and what the code printed."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    parts = [part for cell in cells for part in _parts(cell)]
    parts.insert(1, f"[Download the notebook]({path.stem}/{path.name})")
    return "\n\n".join(parts) + "\n"


def _parts(cell: dict[str, Any]) -> list[str]:
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return [source]
    printed = "".join("".join(output.get("text", "")) for output in cell["outputs"])
    code = f"```python\n{source}\n```"
    return [code, f"```text\n{printed.rstrip()}\n```"] if printed else [code]


def run(path: Path, write: bool) -> float:
    """Run one notebook; return the seconds it took."""
    # The site is built without them.
    import nbformat
    from nbclient import NotebookClient
    from traitlets.config import Config

    notebook = nbformat.read(path, as_version=4)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        # Sockets of this user, instead of ports that every user of the machine can listen to.
        sockets = {"transport": "ipc", "ip": f"{folder}/kernel"}
        config = Config({"KernelManager": sockets})
        NotebookClient(notebook, timeout=300, record_timing=False, config=config).execute()
    if write:
        # What depends on who ran it last is no part of the notebook.
        notebook.metadata = {"kernelspec": {"display_name": "Python 3", "name": "python3"}}
        for number, cell in enumerate(notebook.cells):
            cell["id"] = f"cell-{number}"
        nbformat.write(notebook, path)
    return time.monotonic() - started


def main() -> None:
    """Run all notebooks, and say how long each took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="keep what the cells print")
    write = parser.parse_args().write
    for path in sorted(FOLDER.glob("*.ipynb")):
        print(f"{path.name}: {run(path, write):.0f} s")


if __name__ == "__main__":
    main()
