"""Commands of the README and the documentation compose, links work, and the README is short."""

import ast
import importlib
import re
import shlex
from pathlib import Path
from typing import cast

import pytest
from composing import composed, composed_evaluation
from omegaconf import OmegaConf

from dino_lightning.cli.overrides import with_plain_words
from dino_lightning.config import EvaluateConfig, TrainConfig
from dino_lightning.config.checks.training import check_config
from dino_lightning.evaluation.checks import check_evaluation

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
TRAIN, EVALUATE = ("python train.py", "dino train"), ("dino eval",)


def commands(page: Path, programs: tuple[str, ...]) -> list[str]:
    """The arguments of each command in a fenced block, without comments and with continued lines joined."""
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(), flags=re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    found = [line.split("#")[0].split("&&")[-1].strip() for line in lines]
    return [line.removeprefix(name).strip() for line in found for name in programs if line.startswith(name)]


HERE = ("trainer.precision=", "resume=", "trainer.devices=[")
"""Keys that depend on the machine."""
OTHERS = ("imports=", "hydra/launcher=", "-sc ", "…")
"""Parts of commands that `test_new_method.py`, `test_clusters.py` and `test_quick_start.py` test, and of incomplete
commands."""


def every(programs: tuple[str, ...]) -> list[str]:
    found = {command for page in PAGES for command in commands(page, programs)}
    return sorted(command for command in found if not any(word in command for word in OTHERS))


def test_there_are_commands() -> None:
    assert "" in every(TRAIN)
    assert len(every(TRAIN)) > 80
    assert len(every(EVALUATE)) > 10


@pytest.mark.parametrize("command", every(TRAIN))
def test_commands_compose_and_pass_the_checks(command: str, tmp_path: Path) -> None:
    words = [word for word in shlex.split(command.replace("--cfg job", "")) if not word.startswith("--")]
    words = with_plain_words(words, "data.path", verb="train")
    # The first value of a sweep; this machine's precision and devices; an existing folder.
    words = [word for word in words if not re.search(r"=(tag|interval|choice)\(", word)]  # Optuna draws them
    overrides = [re.sub(r"=([^\[,]+),.*", r"=\1", word) for word in words if not word.startswith("output_dir=")]
    overrides = [f"data.path={tmp_path}" if word.startswith("data.path=") else word for word in overrides]
    overrides = [word for word in overrides if not word.startswith(HERE)]
    # A number, like the folders of a sweep.
    config = composed(*overrides, "trainer.precision=32", output_dir=tmp_path / "0")
    check_config(cast(TrainConfig, OmegaConf.to_object(config)))


@pytest.mark.parametrize("command", every(EVALUATE))
def test_evaluations_compose_and_pass_the_checks(command: str, tmp_path: Path) -> None:
    words = [word for word in shlex.split(command) if not re.fullmatch(r"--.*|\[.*\]", word)]
    words = with_plain_words(words, "checkpoint", verb="eval")
    config = composed_evaluation(*(word.replace("=~", f"={tmp_path}") for word in words), "trainer.precision=32")
    check_evaluation(cast(EvaluateConfig, OmegaConf.to_object(config)))


def python_blocks() -> list[tuple[str, str]]:
    """The page and the code of each Python block."""
    pages = {str(page.relative_to(ROOT)): page.read_text() for page in PAGES}
    return [
        (name, block) for name, text in pages.items() for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    ]


@pytest.mark.parametrize(("page", "block"), python_blocks())
def test_code_is_valid_and_its_imports_exist(page: str, block: str) -> None:
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("dino_lightning"):
            module = importlib.import_module(str(node.module))
            assert [name.name for name in node.names if not hasattr(module, name.name)] == [], page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_to_files_exist(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


def test_the_readme_lists_the_experiments() -> None:
    named = set(re.findall(r"^\| `(\w+)`", (ROOT / "README.md").read_text(), flags=re.MULTILINE))
    files = {path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml")}
    assert named <= files
    assert {name for name in files if name.startswith(("vit", "resnet"))} <= named
