"""Every example runs on the built-in images and on photographs, and saves a picture."""

import re
import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image
from slow_params import first

from dino_lightning.checkpoints import Description, export_backbone
from dino_lightning.config import ViTConfig
from dino_lightning.models.backbones import build_backbone

pytest.importorskip("sklearn", reason="pip install 'dino-lightning[sklearn]'")

EXAMPLES = Path(__file__).parents[1] / "examples"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem != "common")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs `python examples/NAME.py WORDS` in this process, checks the picture and returns the printed lines."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # the feature cache is there
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def run(name: str, *words: str | Path) -> list[str]:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, words)])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        lines = capsys.readouterr().out.splitlines()
        picture = tmp_path / "outputs" / f"example-{name}.png"
        assert lines[-1] == f"Picture: {picture}"
        assert min(Image.open(picture).size) > 100
        return lines

    return run


def test_there_are_examples() -> None:
    assert NAMES == ["cluster", "dedupe", "outliers", "search"]


def test_the_page_names_all_examples_and_their_options() -> None:
    commands = re.findall(r"python examples/(\w+)\.py(.*?)(?:#|$)", (EXAMPLES.parent / "docs" / "use.md").read_text())
    assert sorted(name for name, _ in commands) == NAMES
    for name, words in commands:
        code = (EXAMPLES / f"{name}.py").read_text() + (EXAMPLES / "common.py").read_text()
        assert all(f'"{word}"' in code for word in re.findall(r"--\w+", words)), name


@pytest.mark.parametrize("name", NAMES)
def test_on_the_built_in_images(name: str, run) -> None:
    lines = run(name)
    assert "the network is untrained" in lines[0]
    text = "\n".join(lines)
    match name:
        case "search":
            pairs = re.findall(r"\((.*)\): .*\((.*)\)", text)
            assert len(pairs) == 6
            assert sum(query == found for query, found in pairs) >= 3, "of 12 classes"
        case "dedupe":
            groups = [re.findall(r"image (\d+)", line) for line in lines if line.startswith("image ")]
            copied = {str(i): {str(120 + 3 * (i // 10) + j) for j in range(3)} for i in range(0, 120, 10)}
            right = [group for group in groups if set(group[1:]) <= copied.get(group[0], set())]
            assert len(right) >= 6
            assert len(groups) - len(right) <= 1
        case "outliers":
            order = re.findall(r"image (\d+)", text)
            assert sum(int(image) >= 120 for image in order[:6]) >= 3, "of six odd ones among 126 images"
        case "cluster":
            assert float(re.findall(r"labels: (-?[\d.]+)", text)[0]) > 0.2


@pytest.mark.parametrize("name", first(NAMES, fast=2))
def test_on_photographs(name: str, run, shared_data: Path, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    for clip in sorted((shared_data / "davis_mini6" / "JPEGImages" / "480p").iterdir()):
        (photos / clip.name).mkdir(parents=True)
        for frame in sorted(clip.glob("*.jpg"))[:36:12]:
            (photos / clip.name / f"{clip.name}-{frame.name}").symlink_to(frame)
    (photos / "camel" / "broken.jpg").write_text("no picture")
    words = ["--query", *sorted(map(str, photos.glob("dog/*")))[:1]] if name == "search" else []
    lines = run(name, "--path", photos, *words)
    assert "18 images, 64 features each; 1 could not be read" in lines
    if name == "search":
        assert re.search(r"dog-00000\.jpg: .*dog-00000\.jpg", "\n".join(lines)), "the image itself is among the photos"


def test_the_newest_run_is_the_default_network(run, tmp_path: Path) -> None:
    file = tmp_path / "outputs" / "mine" / "teacher.safetensors"
    file.parent.mkdir(parents=True)
    config = ViTConfig(width=48, depth=2, heads=2, patch_size=8)
    weights = build_backbone(config, image_size=32, drop_path=False).state_dict()
    export_backbone(weights, file, Description(config, 32, [0.5] * 3, [0.5] * 3, resize=32, size=32))
    assert run("outliers")[0] == "126 images, 48 features each; 0 could not be read"
