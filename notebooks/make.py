"""Run the notebooks and keep what they show: `python notebooks/make.py`, after a change of theirs or of what they use.

What differs from one machine to another does not stand in them: paths, clocks, and what goes to stderr.
"""

import os
import re
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent
ORDER = ("train", "use")
"""The second takes up what the first leaves."""
TIMEOUT_S = 600
"""For one cell."""


def run(name: str, *, folder: Path) -> nbformat.NotebookNode:
    """The notebook with its outputs, run by a kernel in `folder`. Raises `nbclient.exceptions.CellExecutionError`."""
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    resources = {"metadata": {"path": str(folder)}}
    return NotebookClient(notebook, timeout=TIMEOUT_S, kernel_name="python3", resources=resources).execute()


def cleaned(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook without what differs between machines."""
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # when the cell began and ended
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            for output in cell.outputs:
                _keep_smallest_picture(output)
    notebook.metadata["language_info"] = {"name": "python"}
    return notebook


def _keep_smallest_picture(output: nbformat.NotebookNode) -> None:
    """Of a picture in several formats one, without the words for it, in which an address in memory may stand."""
    data = output.get("data", {})
    pictures = sorted((kind for kind in data if kind.startswith("image/")), key=lambda kind: len(data[kind]))
    if pictures:
        output["data"] = nbformat.from_dict({pictures[0]: data[pictures[0]]})


def shown(notebook: nbformat.NotebookNode) -> list[tuple[str, str]]:
    """Kind and text of all outputs, numbers as N: `("picture", "")`, `("text", "N % of N images\n")`."""
    found = []
    for output in (output for cell in notebook.cells for output in cell.get("outputs", [])):
        data = output.get("data", {"text/plain": output.get("text", "")})
        if any(kind.startswith("image/") for kind in data):
            found.append(("picture", ""))
        else:
            found.append(("text", re.sub(r"\d+(\.\d+)?", "N", data.get("text/plain", ""))))
    return found


def main() -> None:
    """Run all in one folder, in their order, and write them back."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with TemporaryDirectory() as folder:
        for name in ORDER:
            nbformat.write(cleaned(run(name, folder=Path(folder))), FOLDER / f"{name}.ipynb")
            print(f"{name}.ipynb", file=sys.stderr)


if __name__ == "__main__":
    main()
