"""The gallery of neighbors: which images are asked about, who their neighbors are, and what the picture shows."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from evaluation_tools import tiny_network, tiny_task
from PIL import Image
from source_cases import write
from torch import Tensor

from dino_lightning.config import BuiltinData, FolderData, NeighborsEval
from dino_lightning.data.decode import Decoder
from dino_lightning.data.sources import ImageSource, Splits
from dino_lightning.data.sources.base import Subset
from dino_lightning.errors import UserError
from dino_lightning.evaluation.classification import neighbors
from dino_lightning.evaluation.context import Result, Task
from dino_lightning.evaluation.features.images import center_view

DATA = BuiltinData(num_workers=0, train_images=60, val_images=36)
CLASSES = 12


def run(task: Task, **config: Any) -> dict[str, Result]:
    results = list(neighbors.evaluate(NeighborsEval(**{"neighbors": 4, **config}), task))
    return {result.metric: result for result in results}


def builtin(folder: Path, **task: Any) -> Task:
    return tiny_task(folder, tiny_network(), data=DATA, **task)


def flat(folder: Path, *, images: int) -> Task:
    """Images without classes, in one folder."""
    for number in range(images):
        write(folder / "images" / f"{number:02d}.png", number)
    data = FolderData(path=str(folder / "images"), cache_dir=str(folder / "lists"), num_workers=0, max_bad_share=1)
    return tiny_task(folder, tiny_network(), data=data)


@torch.no_grad()
def feature(task: Task, source: ImageSource, index: int) -> Tensor:
    image = Decoder(DATA).pil(source.read(index))
    return F.normalize(task.network.backbone(center_view(task.network)(image)[None]).double(), dim=1)[0]


def nearest_by_loops(task: Task, query: int, *, n: int) -> list[tuple[float, int]]:
    """Similarity and position of a query's neighbors; a query among the images is not its own."""
    train, val = task.splits.train, task.splits.val
    assert isinstance(train, ImageSource)
    own = feature(task, train if val is None else val, query)
    others = [i for i in range(len(train)) if val is not None or i != query]
    return sorted(((float(own @ feature(task, train, i)), i) for i in others), reverse=True)[:n]


def shown(task: Task) -> Image.Image:
    with Image.open(task.output / "pictures" / "neighbors.png") as picture:
        return picture.convert("RGB")


def test_neighbors_of_chosen_queries(tmp_path: Path) -> None:
    task = builtin(tmp_path)
    results = run(task, queries=[17, 3, 17])
    train, val = task.splits.train, task.splits.val
    assert isinstance(train, ImageSource)
    assert val is not None
    assert train.labels is not None
    assert val.labels is not None
    expected = [nearest_by_loops(task, query, n=4) for query in (3, 17)]
    for result in results.values():
        assert result.details == {"queries": [3, 17], "neighbors": [[i for _, i in row] for row in expected]}
    same = [val.labels[q] == train.labels[i] for q, row in zip((3, 17), expected, strict=True) for _, i in row]
    assert results["same_class_share"].value == pytest.approx(100 * np.mean(same))
    similarities = [similarity for row in expected for similarity, _ in row]
    assert results["mean_similarity"].value == pytest.approx(np.mean(similarities), abs=1e-5)
    assert [(result.metric, result.unit, result.main) for result in results.values()] == [
        ("same_class_share", "%", True),
        ("mean_similarity", "", False),
    ]


def test_random_queries_show_each_class_before_any_twice(tmp_path: Path) -> None:
    task = builtin(tmp_path)
    val = task.splits.val
    assert val is not None
    assert val.labels is not None
    for n in (5, CLASSES, CLASSES + 4):
        drawn = neighbors.query_indices(NeighborsEval(random_queries=n), val, seed=1)
        assert drawn == sorted(set(drawn))
        assert len(drawn) == n
        counts = Counter(val.labels[drawn].tolist())
        assert len(counts) == min(n, CLASSES)
        assert max(counts.values()) == (1 if n <= CLASSES else 2)
    draws = [neighbors.query_indices(NeighborsEval(), val, seed=seed) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    assert len(neighbors.query_indices(NeighborsEval(random_queries=99), val, seed=0)) == 36
    assert run(task, random_queries=3)["mean_similarity"].details["queries"] == neighbors.query_indices(
        NeighborsEval(random_queries=3), val, seed=0
    )


def test_the_picture_shows_queries_and_neighbors(tmp_path: Path) -> None:
    task = builtin(tmp_path)
    run(task, queries=[0])
    one = shown(task)
    run(task, queries=[0, 1, 2])
    three = shown(task)
    assert three.height > 2 * one.height
    assert three.width == one.width
    run(task, queries=[0], neighbors=8)
    assert shown(task).width > 1.5 * one.width
    assert np.asarray(one).std() > 20


def test_the_picture_is_drawn_from_the_right_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def sheet(queries: Any, found: Any, **labels: Any) -> Image.Image:
        given.update(queries=queries, found=found, **labels)
        return draw(queries, found, **labels)

    draw = neighbors.neighbor_sheet
    monkeypatch.setattr(neighbors, "neighbor_sheet", sheet)
    task = builtin(tmp_path)
    details = run(task, queries=[5, 9], neighbors=2)["mean_similarity"].details
    train, val = task.splits.train, task.splits.val
    assert isinstance(train, ImageSource)
    assert val is not None

    def near(picture: Image.Image, source: ImageSource, index: int) -> bool:
        want = Decoder(DATA).pil(source.read(index)).resize((36, 36), Image.Resampling.BICUBIC).crop((2, 2, 34, 34))
        return float(np.abs(np.asarray(picture, float) - np.asarray(want, float)).mean()) < 1

    def name(source: ImageSource, index: int) -> str:
        assert source.classes is not None
        assert source.labels is not None
        return source.classes[source.labels[index]]

    assert [near(picture, val, i) for picture, i in zip(given["queries"], (5, 9), strict=True)] == [True, True]
    assert not near(given["queries"][0], val, 9)
    for row, positions in zip(given["found"], details["neighbors"], strict=True):
        assert [near(picture, train, i) for picture, i in zip(row, positions, strict=True)] == [True, True]
    assert given["query_labels"] == [name(val, 5), name(val, 9)]
    assert given["neighbor_labels"] == [[name(train, i) for i in row] for row in details["neighbors"]]


def test_the_untrained_network_has_its_own_picture(tmp_path: Path) -> None:
    task = tiny_task(tmp_path, replace(tiny_network(), trained=False), data=DATA)
    run(task, queries=[0])
    assert [path.name for path in (task.output / "pictures").iterdir()] == ["neighbors_untrained.png"]


def test_a_flat_folder_is_searched_without_the_query_itself(tmp_path: Path) -> None:
    task = flat(tmp_path, images=9)
    results = run(task, queries=[2, 7], neighbors=8)
    assert list(results) == ["mean_similarity"]
    result = results["mean_similarity"]
    assert result.main
    expected = [nearest_by_loops(task, query, n=8) for query in (2, 7)]
    assert result.details == {"queries": [2, 7], "neighbors": [[i for _, i in row] for row in expected]}
    assert 2 not in result.details["neighbors"][0]
    assert result.value == pytest.approx(np.mean([s for row in expected for s, _ in row]), abs=1e-5)
    assert shown(task).width > 8 * 96
    drawn = run(task, random_queries=3)["mean_similarity"].details
    assert len(drawn["queries"]) == 3
    assert all(query not in row for query, row in zip(drawn["queries"], drawn["neighbors"], strict=True))


def test_copies_of_a_query_are_its_neighbors(tmp_path: Path) -> None:
    task = flat(tmp_path, images=8)
    for copy in (0, 1, 4, 6):  # more than are shown, with lower and higher positions
        write(tmp_path / "images" / f"{copy:02d}.png", 5)
    details = run(task, queries=[5], neighbors=2)["mean_similarity"].details
    assert details["neighbors"] == [[0, 1]]


def parts(task: Task, indices: Any) -> list[Subset]:
    """The images `indices` of both splits, to be relabeled."""
    sources: Any = task.splits
    return [Subset(source, indices=np.asarray(indices)) for source in (sources.train, sources.val)]


def test_unknown_labels_are_not_judged(tmp_path: Path) -> None:
    task = builtin(tmp_path)
    train, val = parts(task, np.arange(24))
    assert train.labels is not None
    assert val.labels is not None
    val.labels = np.where(np.arange(24) == 0, -1, val.labels)
    train.labels = np.where(np.arange(24) % 2, -1, train.labels)
    task.splits = Splits(train, val, None)
    assert list(run(task, queries=[0])) == ["mean_similarity"]
    results = run(task, queries=[0, 1], neighbors=20)
    known = [i for i in results["mean_similarity"].details["neighbors"][1] if train.labels[i] >= 0]
    same = [train.labels[i] == val.labels[1] for i in known]
    assert results["same_class_share"].value == pytest.approx(100 * np.mean(same))


def test_classes_are_the_same_by_name(tmp_path: Path) -> None:
    task = builtin(tmp_path)
    train, val = parts(task, np.arange(24))
    assert val.classes is not None
    plain = Splits(train, val, None)
    task.splits = plain
    before = run(task, queries=[0, 1])["same_class_share"].value
    val.classes = val.classes[::-1]
    assert val.labels is not None
    val.labels = CLASSES - 1 - val.labels
    assert run(task, queries=[0, 1])["same_class_share"].value == before


@pytest.mark.parametrize("queries", [[36], [-1], [0, 99], []])
def test_positions_out_of_range(tmp_path: Path, queries: list[int]) -> None:
    task = builtin(tmp_path)
    task.network.backbone.register_forward_pre_hook(lambda *_: pytest.fail("the network ran"))
    with pytest.raises(UserError) as caught:
        run(task, queries=queries)
    assert str(caught.value) == f"eval.queries={queries}: expected positions from 0 to 35."


def test_more_neighbors_than_images(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^eval\.neighbors=61: there are 60 images .* set it to at most 60\.$"):
        run(builtin(tmp_path / "builtin"), neighbors=61)
    with pytest.raises(UserError, match=r"^eval\.neighbors=5: there are 4 images .* set it to at most 4\.$"):
        run(flat(tmp_path, images=5), neighbors=5)


def test_broken_images_are_left_out(tmp_path: Path) -> None:
    task = flat(tmp_path, images=6)
    for number in (1, 4):
        (tmp_path / "images" / f"{number:02d}.png").write_bytes(b"no image")
    details = run(task, queries=[1, 2], neighbors=5)["mean_similarity"].details
    assert details["queries"] == [2]
    assert sorted(details["neighbors"][0]) == [0, 3, 5]
    named = (task.output / "bad_images_train.txt").read_text()
    assert "01.png" in named
    assert "04.png" in named
    assert not (task.output / "bad_images_val.txt").exists(), "each is named once"
    with pytest.raises(UserError, match=r"^data: none of the query images can be read, see .*_train\.txt\.$"):
        run(task, queries=[4])
    for number in (0, 3, 5):
        (tmp_path / "images" / f"{number:02d}.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"^data: none of the images to choose from can be read, see .*_train\.txt\.$"):
        run(flat_again(task, tmp_path), queries=[2])


def flat_again(task: Task, folder: Path) -> Task:
    """The same files, opened again."""
    return tiny_task(folder, task.network, data=task.data)
