"""Run the notebooks and save their outputs: `python notebooks/make.py`. Run it after each change of their code.

Outputs that differ between machines are removed: paths, times, and stderr.
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
"""The second notebook uses the file that the first one exports."""
TIMEOUT_S = 600
"""Time limit of one cell (seconds)."""


def run(name: str, *, folder: Path) -> nbformat.NotebookNode:
    """Run a notebook in `folder` and return it with outputs. Raises `nbclient.exceptions.CellExecutionError`."""
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    resources = {"metadata": {"path": str(folder)}}
    return NotebookClient(notebook, timeout=TIMEOUT_S, kernel_name="python3", resources=resources).execute()


def cleaned(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Remove outputs that differ between machines."""
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # start and end times of the cell
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            for output in cell.outputs:
                _keep_smallest_picture(output)
    notebook.metadata["language_info"] = {"name": "python"}
    return notebook


def _keep_smallest_picture(output: nbformat.NotebookNode) -> None:
    """Keep one format of a picture, and drop its text form, which may contain a memory address."""
    data = output.get("data", {})
    pictures = sorted((kind for kind in data if kind.startswith("image/")), key=lambda kind: len(data[kind]))
    if pictures:
        output["data"] = nbformat.from_dict({pictures[0]: data[pictures[0]]})


def shown(notebook: nbformat.NotebookNode) -> list[tuple[str, str]]:
    """Return kind and text of all outputs, numbers as N: `("picture", "")`, `("text", "N % of N images\n")`."""
    found = []
    for output in (output for cell in notebook.cells for output in cell.get("outputs", [])):
        data = output.get("data", {"text/plain": output.get("text", "")})
        if any(kind.startswith("image/") for kind in data):
            found.append(("picture", ""))
        else:
            found.append(("text", re.sub(r"\d+(\.\d+)?", "N", data.get("text/plain", ""))))
    return found


def main() -> None:
    """Run all notebooks in one folder, in order, and save them."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with TemporaryDirectory() as folder:
        for name in ORDER:
            nbformat.write(cleaned(run(name, folder=Path(folder))), FOLDER / f"{name}.ipynb")
            print(f"{name}.ipynb", file=sys.stderr)


if __name__ == "__main__":
    main()
