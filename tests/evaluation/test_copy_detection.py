"""Copy detection from files to figures, compared with the protocol for one image at a time."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from evaluation_tools import MEAN, STD, timm_network, tiny_network, tiny_task
from landmark_cases import write_copydays, write_others
from oracles_ranking import area, ranked
from PIL import Image
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from dino_lightning.config import CopydaysData, CopyDetectionEval
from dino_lightning.errors import UserError
from dino_lightning.evaluation.context import Result
from dino_lightning.evaluation.retrieval import copy_detection
from dino_lightning.evaluation.retrieval.descriptors import cls_and_gem
from dino_lightning.models.frozen import FrozenNetwork

SIZE = 32
BLOCKS = ["original", "strong", "jpegqual/5", "jpegqual/20", "crops/10"]


@pytest.fixture
def data(tmp_path: Path) -> CopydaysData:
    return write_copydays(tmp_path / "data")


def run(
    tmp_path: Path,
    data: CopydaysData,
    network: FrozenNetwork | None = None,
    *,
    save_pictures: bool = False,
    **config: Any,
) -> dict[str, Result]:
    task = tiny_task(tmp_path, network or tiny_network(), data=data, save_pictures=save_pictures)
    results = copy_detection.evaluate(CopyDetectionEval(**{"image_size": SIZE, **config}), task)
    return {result.metric: result for result in results}


@torch.no_grad()
def descriptor(network: FrozenNetwork, path: Path, *, power: float = 4) -> Tensor:
    """The original's steps for one image, one value at a time in the pooling."""
    resize = transforms.Resize((SIZE, SIZE), interpolation=InterpolationMode.BICUBIC)
    steps: Any = transforms.Compose([resize, transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
    backbone: Any = network.backbone
    tokens = backbone.forward_features(steps(Image.open(path).convert("RGB"))[None])[0]
    channels = tokens[1:].T.tolist()
    pooled = [(sum(max(value, 1e-6) ** power for value in own) / len(own)) ** (1 / power) for own in channels]
    return torch.cat([tokens[0], torch.tensor(pooled)]).double()


def expected(
    data: CopydaysData, network: FrozenNetwork, *, power: float = 4, top: int = 20, whitening: str = "none"
) -> dict[str, float]:
    root = Path(data.path)
    originals = sorted((root / "original").iterdir())
    others = sorted(Path(data.distractors_path).rglob("*.png")) if data.distractors_path else []
    mean, scaled = torch.zeros(1), None
    if whitening != "none":
        assert data.whitening_path
        bank = torch.stack([descriptor(network, path, power=power) for path in Path(data.whitening_path).rglob("*.*")])
        mean = bank.mean(0)
        around = bank if whitening == "original" else bank - mean
        spectrum, directions = torch.linalg.eigh(around.T @ around / len(bank))
        scaled = directions / spectrum.clamp(min=1e-5 * spectrum.max()).sqrt()

    def final(path: Path) -> Tensor:
        plain = descriptor(network, path, power=power)
        return F.normalize(plain if scaled is None else (plain - mean) @ scaled, dim=0)

    database = [final(path) for path in (*originals, *others)]
    figures = {}
    for block in BLOCKS:
        aps = []
        for query in sorted((root / block).iterdir()):
            own = final(query)
            order = ranked([float(own @ other) for other in database])[:top]
            positives = [i for i, path in enumerate(originals) if path.name[:4] == query.name[:4]]
            aps.append(area([rank for rank, i in enumerate(order) if i in positives], total=len(positives)))
        figures[f"map_{block.replace('/', '_')}"] = 100 * sum(aps) / len(aps)
    return figures


@pytest.mark.parametrize("options", [{}, {"gem_power": 1.5}, {"top": 2}])
@pytest.mark.slow_after_first(1)
def test_figures_equal_one_image_at_a_time(options: dict[str, Any], data: CopydaysData, tmp_path: Path) -> None:
    data.distractors_path = str(write_others(tmp_path / "distractors"))
    network = tiny_network()
    got = run(tmp_path, data, network, **options)
    want = expected(data, network, power=options.get("gem_power", 4), top=options.get("top", 20))
    assert {name: result.value for name, result in got.items()} == pytest.approx(want, abs=1e-9)
    assert list(got) == list(want)
    assert got["map_original"].value == 100, "a photograph finds itself"
    assert 5 < want["map_strong"] < 95, "too easy or too hard to detect an error"
    assert [name for name, result in got.items() if result.main] == ["map_strong"]


@pytest.mark.parametrize("whitening", ["none", "original", "corrected"])
@pytest.mark.slow_after_first(1)
def test_whitening(whitening: str, data: CopydaysData, tmp_path: Path) -> None:
    data.whitening_path = str(write_others(tmp_path / "others", count=30))
    network = tiny_network()
    got = run(tmp_path, data, network, whitening=whitening)
    want = expected(data, network, whitening=whitening)
    assert {name: result.value for name, result in got.items()} == pytest.approx(want, abs=1e-9)
    assert got["map_strong"].details["whitening"] == whitening


def test_without_images_to_learn_from_nothing_is_whitened(data: CopydaysData, tmp_path: Path) -> None:
    assert run(tmp_path, data)["map_strong"].details["whitening"] == "none"


def test_details(data: CopydaysData, tmp_path: Path) -> None:
    strong = run(tmp_path, data)["map_strong"]
    assert list(strong.details["ap"])[:2] == ["200001.jpg", "200002.jpg"]
    assert sum(strong.details["ap"].values()) / 8 == pytest.approx(strong.value)
    assert strong.details["queries"] == 8


def test_gem_between_mean_and_maximum() -> None:
    network, images = tiny_network(), torch.randn(2, 3, 32, 48)
    backbone: Any = network.backbone
    patches = backbone.forward_features(images)[:, 1:].clamp(min=1e-6)
    mean, four, twenty = (cls_and_gem(backbone, images, power=power)[:, 32:] for power in (1.0, 4.0, 20.0))
    torch.testing.assert_close(mean, patches.mean(dim=1))
    most = patches.amax(dim=1)
    assert (mean < four).all()
    assert (four < twenty).all()
    assert (twenty <= most).all()
    # The largest of 24 patches is at least 1 / 24 of their mean's power.
    assert (twenty >= most / 24 ** (1 / 20)).all()
    torch.testing.assert_close(cls_and_gem(backbone, images, power=4)[:, :32], backbone.forward_features(images)[:, 0])


def test_broken_images(data: CopydaysData, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = Path(data.path)
    whole = run(tmp_path / "whole", data)
    (root / "strong/200001.jpg").write_bytes(b"")
    (root / "original/200200.jpg").write_bytes(b"broken")
    (root / "strong/209901.jpg").write_bytes((root / "strong/200101.jpg").read_bytes())
    strong = run(tmp_path, data)["map_strong"]
    said = " ".join(capsys.readouterr().err.split())
    assert "1 of 9 queries of strong/ cannot be read and are left out: 200001.jpg" in said
    assert "1 of 9 queries of strong/ show none of the originals and are left out: 209901.jpg" in said
    assert strong.details["unreadable"] == ["200001.jpg"]
    assert strong.details["without_original"] == ["209901.jpg"]
    assert strong.details["queries"] == 7
    assert strong.details["ap"]["200201.jpg"] == 0, "its photograph is never retrieved"
    before = whole["map_strong"].details["ap"]
    for name in ("200101.jpg", "200302.jpg"):
        assert strong.details["ap"][name] >= before[name], "positions in the database are still those of the files"
    assert "200200.jpg" in (tmp_path / "out/bad_images_images.txt").read_text()


def test_wrong_networks_and_folders_are_refused(data: CopydaysData, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"eval=copy_detection needs a ViT.*resnet18 is ResNet"):
        run(tmp_path, data, timm_network("resnet18"))
    with pytest.raises(UserError, match=r"data.whitening_path=.*does not exist"):
        run(tmp_path, CopydaysData(path=data.path, num_workers=0, whitening_path=str(tmp_path / "nowhere")))
    for image in (tmp_path / "data/original").iterdir():
        image.write_bytes(b"")
    with pytest.raises(UserError, match=r"none of the 5 images of original/ can be read"):
        run(tmp_path, data)


def test_each_setting_has_its_own_feature_cache(data: CopydaysData, tmp_path: Path) -> None:
    changes: list[dict[str, Any]] = [{}, {"image_size": 24}, {"gem_power": 2.0}]
    plain = [{name: result.value for name, result in run(tmp_path, data, **config).items()} for config in changes]
    for config, expected_values in zip([*changes, changes[0]], [*plain, plain[0]], strict=True):
        task = tiny_task(tmp_path, tiny_network(), data=data, cache=tmp_path / "cache", save_pictures=False)
        cached = copy_detection.evaluate(CopyDetectionEval(**{"image_size": SIZE, **config}), task)
        assert {result.metric: result.value for result in cached} == expected_values


def test_the_picture_shows_worst_and_best(data: CopydaysData, tmp_path: Path) -> None:
    run(tmp_path, data, save_pictures=True)
    sheet = Image.open(tmp_path / "out/pictures/neighbors.png")
    assert sheet.height > 8 * 128
