"""The README's commands compose, its links lead somewhere, and it stays short."""

import re
import shlex
from pathlib import Path
from typing import cast

import pytest
from composing import composed
from omegaconf import OmegaConf

from dino_lightning.checks import check_config
from dino_lightning.config import TrainConfig

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(page: Path) -> list[str]:
    """Every `python train.py …` in a fenced block, without comments, continued lines joined."""
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(), flags=re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    found = [line.split("#")[0].split("&&")[-1].strip() for line in lines]
    return [line for line in found if line.startswith("python train.py")]


OTHERS = ("imports=", "hydra/launcher=")
ALL = sorted({command for page in PAGES for command in commands(page) if not any(word in command for word in OTHERS)})
"""Without those of `test_new_method.py` and `test_clusters.py`."""


def test_there_are_commands() -> None:
    assert "python train.py" in ALL
    assert len(ALL) > 10


@pytest.mark.parametrize("command", ALL)
def test_commands_compose_and_pass_the_checks(command: str, tmp_path: Path) -> None:
    words = [word for word in shlex.split(command)[2:] if not word.startswith("--")]
    # The first value of a sweep; this machine's precision; a folder that is there.
    words = [word for word in words if not re.search(r"=(tag|interval|choice)\(", word)]  # Optuna's to draw
    overrides = [re.sub(r"=([^\[,]+),.*", r"=\1", word) for word in words if not word.startswith("output_dir=")]
    overrides = [f"data.path={tmp_path}" if word.startswith("data.path=") else word for word in overrides]
    overrides = [word for word in overrides if not word.startswith(("trainer.precision=", "resume="))]
    # Numbered as the folders of a sweep are.
    config = composed(*overrides, "trainer.precision=32", output_dir=tmp_path / "0")
    check_config(cast(TrainConfig, OmegaConf.to_object(config)))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) < 250


def test_experiments_in_the_readme_are_those_there_are() -> None:
    named = set(re.findall(r"^\| `(\w+)`", (ROOT / "README.md").read_text(), flags=re.MULTILINE))
    files = {path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml")}
    assert named <= files
    assert {name for name in files if name.startswith(("vit", "resnet"))} <= named
