"""The notebooks run, and their outputs are the committed ones."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

nbformat = pytest.importorskip("nbformat", reason='notebooks need pip install -e ".[docs]"')
for needed in ("nbclient", "ipykernel", "matplotlib", "pandas", "sklearn"):
    pytest.importorskip(needed, reason='notebooks need pip install -e ".[docs]"')

FOLDER = Path(__file__).parents[1] / "notebooks"
NAMES = ("train", "use")
PICTURES = {"train": 3, "use": 3}


@pytest.fixture(scope="module")
def make() -> ModuleType:
    """The module `notebooks/make.py`."""
    specification = importlib.util.spec_from_file_location("make", FOLDER / "make.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_there_are_two(make: ModuleType) -> None:
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == sorted(NAMES)
    assert make.ORDER == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_committed_as_run_and_cleaned(name: str, make: ModuleType) -> None:
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "run in one go, from the top"
    assert all(output.output_type != "error" and output.get("name") != "stderr" for c in code for output in c.outputs)
    kinds = [kind for kind, _ in make.shown(notebook)]
    assert kinds.count("picture") == PICTURES[name]
    before = nbformat.writes(notebook)
    assert nbformat.writes(make.cleaned(notebook)) == before
    # No folder of this machine and no duration.
    texts = "\n".join(str(output) for cell in code for output in cell.outputs if "image" not in str(output)[:400])
    assert not re.search(r"/(home|root|tmp|Users|work)/|\b\d+(\.\d+)?\s*(s|ms|images/s)\b|0x[0-9a-f]{6,}", texts)


@pytest.mark.slow
def test_the_notebooks_run_in_order(make: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a real kernel; the second uses the results of the first."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name in NAMES:
        committed = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
        done = make.cleaned(make.run(name, folder=tmp_path))
        # Machines round differently, so figures may differ; text and positions of pictures may not.
        assert make.shown(done) == make.shown(committed)
    trained, untrained = (
        float(re.findall(rf"{word} +([\d.]+) %", str(nbformat.read(FOLDER / "train.ipynb", as_version=4)))[-1])
        for word in ("\\\\ntrained", "untrained")
    )
    assert trained > untrained
