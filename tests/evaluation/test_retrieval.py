"""Landmark retrieval from files to figures, compared with the protocol for one image at a time."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from evaluation_tools import MEAN, STD, timm_network, tiny_network, tiny_task
from landmark_cases import LANDMARKS, VIEWS, write_others, write_revisited
from oracles_ranking import AT, NOT_RETRIEVABLE, definition
from PIL import Image
from slow_params import first
from torch import Tensor, nn
from torchvision import transforms

from dino_lightning.config import RetrievalEval, RevisitedData
from dino_lightning.data.benchmarks.revisited import open_revisited
from dino_lightning.errors import UserError
from dino_lightning.evaluation.context import Result
from dino_lightning.evaluation.retrieval import retrieval
from dino_lightning.evaluation.retrieval.descriptors import groups_of_equal_size, multi_scale
from dino_lightning.models.frozen import FrozenNetwork
from dino_lightning.report.pictures.sheets import AGREES, DIFFERS, UNJUDGED

SIZE = 48


@pytest.fixture
def data(tmp_path: Path) -> RevisitedData:
    return write_revisited(tmp_path / "data")


def run(
    tmp_path: Path,
    data: RevisitedData,
    network: FrozenNetwork | None = None,
    *,
    save_pictures: bool = False,
    **config: Any,
) -> dict[str, Result]:
    task = tiny_task(tmp_path, network or tiny_network(), data=data, save_pictures=save_pictures)
    results = retrieval.evaluate(RetrievalEval(**{"image_size": SIZE, **config}), task)
    return {result.metric: result for result in results}


def values(results: dict[str, Result]) -> dict[str, float]:
    return {name: result.value for name, result in results.items()}


@torch.no_grad()
def feature(backbone: nn.Module, path: Path, *, box: Any = None, scales: list[float]) -> Tensor:
    """The steps of the original for one image, after the crop of the benchmark."""
    image = Image.open(path).convert("RGB")
    image = image.crop(box) if box else image
    image.thumbnail((SIZE, SIZE), Image.Resampling.LANCZOS)
    steps: Any = transforms.Compose([transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
    tensor = steps(image)[None]
    total = torch.zeros(1)
    for scale in scales:
        resized = F.interpolate(tensor, scale_factor=scale, mode="bilinear", align_corners=False)
        resized = tensor if scale == 1 else resized
        H, W = resized.shape[-2:]
        # A convolution of stride 8 ignores the rest.
        total = total + backbone(resized[..., : H - H % 8, : W - W % 8])
    return (total / total.norm())[0].double()


def expected(data: RevisitedData, backbone: nn.Module, *, query_box: bool, scales: list[float]) -> dict[str, float]:
    benchmark = open_revisited(data)
    database = [feature(backbone, path, scales=scales) for path in benchmark.images]
    figures: dict[str, list[list[float]]] = {"easy": [], "medium": [], "hard": []}
    for query in benchmark.queries:
        own = feature(backbone, query.path, box=query.box if query_box else None, scales=scales)
        similarity = [float(own @ other) for other in database]
        for setup, right, neither in (
            ("easy", query.easy, query.junk + query.hard),
            ("medium", query.easy + query.hard, query.junk),
            ("hard", query.hard, query.junk + query.easy),
        ):
            ap, precisions = definition(similarity, right, neither)
            if not math.isnan(ap):
                figures[setup].append([ap, *precisions])
    names = ["map", *(f"mp{k}" for k in AT)]
    return {
        f"{name}_{setup}": 100 * sum(row[column] for row in rows) / len(rows)
        for setup, rows in figures.items()
        for column, name in enumerate(names)
    }


@pytest.mark.parametrize("query_box", [False, True])
@pytest.mark.parametrize("scales", [[1.0], [1, 1 / math.sqrt(2), 0.5]])
@pytest.mark.slow_after_first(2)
def test_figures_equal_one_image_at_a_time(
    query_box: bool, scales: list[float], data: RevisitedData, tmp_path: Path
) -> None:
    network = tiny_network()
    got = run(tmp_path, data, network, query_box=query_box, scales=scales)
    want = expected(data, network.backbone, query_box=query_box, scales=scales)
    assert values(got) == pytest.approx(want, abs=1e-9)
    assert 5 < want["map_medium"] < 95, "too easy or too hard to detect an error"
    assert [name for name, result in got.items() if result.main] == ["map_medium", "map_hard"]
    assert {result.unit for result in got.values()} == {"%"}


def test_box_scales_and_size_change_the_figures(data: RevisitedData, tmp_path: Path) -> None:
    plain = values(run(tmp_path, data))
    assert values(run(tmp_path, data, query_box=True)) != plain
    assert values(run(tmp_path, data, scales=[1.0, 0.5])) != plain
    assert values(run(tmp_path, data, image_size=24)) != plain


def test_details_have_the_ap_of_each_query(data: RevisitedData, tmp_path: Path) -> None:
    results = run(tmp_path, data)
    easy, medium = results["map_easy"].details, results["map_medium"].details
    assert list(medium["ap"]) == [f"query{i}" for i in range(LANDMARKS)]
    assert sum(medium["ap"].values()) / LANDMARKS == pytest.approx(results["map_medium"].value)
    assert "query0" not in easy["ap"], "it has no easy image"
    assert (easy["queries"], medium["queries"]) == (LANDMARKS - 1, LANDMARKS)


@pytest.mark.parametrize("batch_size", [4, 100])
def test_batches_of_equal_shapes_change_nothing(batch_size: int, data: RevisitedData, tmp_path: Path) -> None:
    single = run(tmp_path, data)
    batched = run(tmp_path, data, batch_size_per_device=batch_size)
    assert values(batched) == pytest.approx(values(single), abs=1e-9)


def test_groups_contain_every_image_once(data: RevisitedData) -> None:
    paths = open_revisited(data).images
    paths[7].write_bytes(b"no image")
    groups = dict(groups_of_equal_size(paths, batch_size=3))
    assert set(groups) == {(64, 48), (48, 64), None}
    assert groups[None] == [0, 7]
    assert sorted(i for own in groups.values() for i in own) == list(range(len(paths)))
    assert all(Image.open(paths[i]).size == size for size, own in groups.items() if size for i in own)
    assert groups_of_equal_size(paths, batch_size=1) == [(None, list(range(len(paths))))]


def test_features_of_a_batch_are_normalized_per_image() -> None:
    images = torch.randn(3, 3, 32, 41)
    features = multi_scale(tiny_network().backbone, images, scales=[1.0, 0.5])
    torch.testing.assert_close(features.norm(dim=1), torch.ones(3))
    alone = torch.cat([multi_scale(tiny_network().backbone, image[None], scales=[1.0, 0.5]) for image in images])
    torch.testing.assert_close(features, alone)


@pytest.mark.parametrize("shape", [(2, 64), (64, 1), (7, 7)])
def test_an_image_smaller_than_a_patch_is_padded(shape: tuple[int, int]) -> None:
    images = torch.randn(1, 3, *shape)
    for network in (tiny_network(), timm_network("resnet18")):
        assert multi_scale(network.backbone, images, scales=[1.0, 0.5]).isfinite().all()


@pytest.mark.parametrize("name", first(["convnext_atto", "resnet50", "xcit_nano_12_p16_224", "mobilenetv3_small_050"]))
def test_other_networks_of_timm(name: str, data: RevisitedData, tmp_path: Path) -> None:
    results = run(tmp_path, data, timm_network(name))
    assert 0 < results["map_medium"].value <= 100


def test_a_network_for_squares_only_is_refused(data: RevisitedData, tmp_path: Path) -> None:
    network = timm_network("vit_tiny_patch16_224", img_size=48)
    with pytest.raises(UserError, match=r"eval.image_size=48: vit_tiny_patch16_224 does not accept images of 48 x 36"):
        run(tmp_path, data, network)


def test_the_default_size_is_that_of_the_checkpoint(data: RevisitedData, tmp_path: Path) -> None:
    network = tiny_network(24)
    assert values(run(tmp_path, data, network, image_size=None)) == values(run(tmp_path, data, network, image_size=24))


def test_whitening(data: RevisitedData, tmp_path: Path) -> None:
    data.whitening_path = str(write_others(tmp_path / "others", count=40))
    network = tiny_network()
    got = run(tmp_path, data, network, whitening=True)
    bank = torch.stack([feature(network.backbone, path, scales=[1]) for path in Path(data.whitening_path).rglob("*.*")])
    spectrum, directions = torch.linalg.eigh(torch.cov(bank.T, correction=0))
    scaled = directions / spectrum.clamp(min=1e-5 * spectrum.max()).sqrt()
    benchmark = open_revisited(data)
    database, queries = (
        F.normalize((torch.stack([feature(network.backbone, p, scales=[1]) for p in paths]) - bank.mean(0)) @ scaled)
        for paths in (benchmark.images, [query.path for query in benchmark.queries])
    )
    rows = (queries @ database.T).tolist()
    medium = [
        definition(row, query.easy + query.hard, query.junk)[0]
        for row, query in zip(rows, benchmark.queries, strict=True)
    ]
    assert got["map_medium"].value == pytest.approx(100 * sum(medium) / len(medium), abs=1e-9)


def test_settings_that_contradict_each_other(data: RevisitedData, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"eval.whitening=true needs data.whitening_path"):
        retrieval.check(RetrievalEval(whitening=True), data)
    data.whitening_path = str(tmp_path / "data")
    with pytest.raises(UserError, match=r"is used only with eval.whitening=true"):
        retrieval.check(RetrievalEval(), data)
    data.whitening_path = str(tmp_path / "dat")
    with pytest.raises(UserError, match=r"data.whitening_path=.* does not exist.*did you mean 'data'"):
        run(tmp_path, data, whitening=True)


def test_broken_images(data: RevisitedData, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    benchmark = open_revisited(data)
    benchmark.queries[1].path.write_bytes(b"")
    hard = benchmark.queries[2].hard[0]
    benchmark.images[hard].write_bytes(benchmark.images[hard].read_bytes()[:200])
    results = run(tmp_path, data)
    assert "1 of 6 queries cannot be read and are left out: query1" in capsys.readouterr().err
    medium = results["map_medium"].details
    assert "query1" not in medium["ap"]
    assert (medium["unreadable_queries"], medium["unreadable_database"]) == (["query1"], 1)
    assert results["map_hard"].details["ap"]["query2"] == 0, "its only hard image is never found"
    assert "query1.jpg" in (tmp_path / "out/bad_images_queries.txt").read_text()
    assert benchmark.images[hard].name in (tmp_path / "out/bad_images_database.txt").read_text()

    backbone = tiny_network().backbone
    row = []
    own = feature(backbone, benchmark.queries[2].path, scales=[1])
    for i, path in enumerate(benchmark.images):
        row.append(NOT_RETRIEVABLE if i == hard else float(own @ feature(backbone, path, scales=[1])))
    want, _ = definition(row, [*benchmark.queries[2].easy, hard], benchmark.queries[2].junk)
    assert medium["ap"]["query2"] == pytest.approx(100 * want, abs=1e-9)


def test_no_readable_image_is_one_sentence(data: RevisitedData, tmp_path: Path) -> None:
    for query in open_revisited(data).queries:
        query.path.write_bytes(b"")
    with pytest.raises(UserError, match=r"none of the 6 images for queries can be read; see bad_images_queries.txt"):
        run(tmp_path, data)


@pytest.mark.slow
def test_each_setting_has_its_own_feature_cache(data: RevisitedData, tmp_path: Path) -> None:
    changes: list[dict[str, Any]] = [{}, {"image_size": 24}, {"scales": [1.0, 0.5]}, {"query_box": True}, {}]
    for config in changes:
        task = tiny_task(tmp_path, tiny_network(), data=data, cache=tmp_path / "cache")
        kept = retrieval.evaluate(RetrievalEval(**{"image_size": SIZE, **config}), task)
        assert {result.metric: result.value for result in kept} == values(run(tmp_path, data, **config))


def test_the_picture_frames_the_retrieved_images(data: RevisitedData, tmp_path: Path) -> None:
    run(tmp_path, data, save_pictures=True)
    sheet = Image.open(tmp_path / "out/pictures/neighbors.png").convert("RGB")
    colors = {color for _, color in sheet.getcolors(sheet.width * sheet.height) or []}
    assert {AGREES, DIFFERS, UNJUDGED} <= colors
    assert sheet.height > LANDMARKS * 128
    assert VIEWS * LANDMARKS > retrieval.SHEET_COLUMNS
