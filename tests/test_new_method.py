"""The file, the command and the test of docs/new_method.md work."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from composing import SMALL, composed
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from programs import run_program

from dino_lightning.cli.errors import message_for
from dino_lightning.cli.plugins import import_one, with_imports
from dino_lightning.config import SCHEMAS
from dino_lightning.errors import UserError
from dino_lightning.methods.registry import METHODS

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "new_method.md").read_text()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the page's two files."""
    place = tmp_path_factory.mktemp("own")
    for name, text in zip(
        ("simsiam.py", "test_simsiam.py"), re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL), strict=True
    ):
        assert f"`{name}`" in PAGE
        (place / name).write_text(text)
    return place


def run(words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], cwd=folder, capture_output=True, text=True, check=False)


def test_the_page_trains(folder: Path) -> None:
    (command,) = re.findall(r"^python (train\.py imports=.*crops.*)$", PAGE, re.MULTILINE)
    script, *words = command.split()
    words += [*SMALL, "trainer.enable_progress_bar=false", "output_dir=out"]
    done = run_program(str(ROOT / script), *words, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "Trained" in done.stdout
    header, *_ = (folder / "out" / "metrics.csv").read_text().splitlines()
    assert {"train/loss", "simsiam/predicted_norm", "collapse/feature_std", "knn/top1"} <= set(header.split(","))
    assert "simsiam.py" in (folder / "out" / "config.yaml").read_text()


@pytest.fixture
def imported(folder: Path) -> Iterator[None]:
    """Imports the page's method until the end of a test."""
    import_one(str(folder / "simsiam.py"))
    yield
    del METHODS[SCHEMAS["method"].pop("simsiam")]
    for option in ("simsiam", "schema_simsiam"):
        del ConfigStore.instance().repo["method"][f"{option}.yaml"]
    del sys.modules["dino_lightning.cli.plugins.simsiam"]


@pytest.mark.usefixtures("imported")
def test_its_keys_are_checked() -> None:
    assert composed("method=simsiam").method.hidden_dim == 512
    with pytest.raises(HydraException) as refused:
        composed("method=simsiam", "method.hiden_dim=3")
    assert "method.hidden_dim" in message_for(refused.value)


@pytest.mark.slow
def test_the_test_of_the_page_passes(folder: Path) -> None:
    (command,) = re.findall(r"^pytest (.*)$", PAGE, re.MULTILINE)
    done = run(["-m", "pytest", "-q", command], folder)
    assert done.returncode == 0, done.stdout
    assert "1 passed" in done.stdout


def test_failed_imports_are_reported(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("import no_such_thing\n")
    with pytest.raises(UserError, match=r"mime\.py: there is no such file; .*mine\.py"):
        import_one(str(tmp_path / "mime.py"))
    for _ in range(2):  # a failed import is not cached
        with pytest.raises(UserError, match="No module named 'no_such_thing'"):
            import_one(str(tmp_path / "mine.py"))
    (tmp_path / "json.py").write_text("")
    with pytest.raises(UserError, match="'json' is the name of another Python module"):
        import_one(str(tmp_path / "json.py"))


def test_names_with_and_without_brackets() -> None:
    for word in ("imports=json,csv", "imports=[json,csv]", "imports=['json', \"csv\"]"):
        assert with_imports(["a=1", word]) == ["a=1", 'imports=["json","csv"]']
