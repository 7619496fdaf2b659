"""k-NN of whole data sets from images to figures, against loops over queries, and what it refuses."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from evaluation_tools import tiny_network, tiny_task
from ranks import on_ranks
from source_cases import write

from dino_lightning.config import BuiltinData, DataConfig, FolderData, KNNEval
from dino_lightning.data.sources import Splits
from dino_lightning.data.sources.base import Subset
from dino_lightning.errors import UserError
from dino_lightning.evaluation.classification import knn
from dino_lightning.evaluation.classification.splits import open_labeled
from dino_lightning.evaluation.context import Result, Task
from dino_lightning.evaluation.features.images import center_view
from dino_lightning.runtime.collectives import leave_group

DATA = BuiltinData(num_workers=0, train_images=90, val_images=41)
CLASSES = 12


def make_task(folder: Path, data: DataConfig = DATA, **task: Any) -> Task:
    return tiny_task(folder, tiny_network(), data=data, **task)


def run(task: Task, **config: Any) -> dict[str, Result]:
    results = list(knn.evaluate(KNNEval(**{"k": [1, 5, 20], "batch_size_per_device": 16, **config}), task))
    assert len({result.metric for result in results}) == len(results)
    return {result.metric: result for result in results}


def values(results: dict[str, Result]) -> dict[str, float]:
    return {name: result.value for name, result in results.items()}


@torch.no_grad()
def features(task: Task, split: str, indices: Sequence[int]) -> list[tuple[np.ndarray, int]]:
    """One image at a time: the unit feature in double precision, and the label."""
    source: Any = getattr(task.splits, split)
    view, found = center_view(task.network), []
    for index in indices:
        feature = task.network.backbone(view(torch.from_numpy(source.read(index)).permute(2, 0, 1))[None])
        feature = feature[0].double().numpy()
        found.append((feature / math.sqrt(float(feature @ feature)), int(source.labels[index])))
    return found


def oracle(bank: list, queries: list, *, k: int, temperature: float) -> dict[str, float]:
    """The protocol for one query after the other; a class without votes may be guessed, after those with some."""
    right = {1: 0, 5: 0}
    for feature, label in queries:
        ranked = sorted(((float(feature @ other), of) for other, of in bank), reverse=True)[:k]
        votes = [0.0] * CLASSES
        for similarity, of in ranked:
            votes[of] += math.exp((similarity - ranked[0][0]) / temperature)
        guesses = sorted(range(CLASSES), key=lambda of: -votes[of])
        for top in right:
            right[top] += label in guesses[: min(top, k)]
    return {f"top{top}": 100 * count / len(queries) for top, count in right.items()}


def test_figures_equal_loops_over_the_queries(tmp_path: Path) -> None:
    task = make_task(tmp_path)
    results = run(task, temperatures=[0.07, 0.01])
    bank, queries = features(task, "train", range(90)), features(task, "val", range(41))
    expected = {
        f"{name}_k{k}_t{temperature}": value
        for temperature in (0.07, 0.01)
        for k in (1, 5, 20)
        for name, value in oracle(bank, queries, k=k, temperature=temperature).items()
    }
    assert values(results) == pytest.approx(expected)
    assert len(set(expected.values())) >= 6, "the figures differ"
    assert [name for name, result in results.items() if result.main] == [
        f"top{top}_k20_t{temperature}" for temperature in ("0.07", "0.01") for top in (1, 5)
    ]
    assert results["top1_k5_t0.01"].details == {"bank": 90, "queries": 41, "classes": CLASSES}


def test_one_search_serves_all_k_and_temperatures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    searched = []

    def nearest(*arguments: Any, **options: Any) -> Any:
        searched.append(options["k"])
        return search(*arguments, **options)

    search = knn.nearest_neighbors
    monkeypatch.setattr(knn, "nearest_neighbors", nearest)
    together = values(run(make_task(tmp_path), k=[3, 10], temperatures=[0.07, 1.0]))
    assert searched == [10]
    alone = values(run(make_task(tmp_path), k=[3], temperatures=[1.0]))
    assert alone == {"top1_k3": together["top1_k3_t1"], "top5_k3": together["top5_k3_t1"]}


def test_the_headline_is_twenty_or_the_first(tmp_path: Path) -> None:
    results = run(make_task(tmp_path), k=[7, 3])
    assert [name for name, result in results.items() if result.main] == ["top1_k7", "top5_k7"]


def test_a_few_images_of_each_class(tmp_path: Path) -> None:
    task = make_task(tmp_path)
    images = open_labeled(task)
    draws = [knn.bank_indices(KNNEval(n_per_class=2), images, seed=seed) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    labels = images.train.labels
    assert labels is not None
    for drawn in draws:
        assert drawn == sorted(set(drawn))
        assert np.bincount(labels[drawn]).tolist() == [2] * len(images.classes)
    results = run(task, n_per_class=2, k=[5])
    assert results["top1_k5"].details["bank"] == len(draws[0])
    bank, queries = features(task, "train", draws[0]), features(task, "val", range(41))
    assert values(results) == pytest.approx(
        {f"{name}_k5": value for name, value in oracle(bank, queries, k=5, temperature=0.07).items()}
    )


def test_each_image_of_a_class_is_equally_likely(tmp_path: Path) -> None:
    images = open_labeled(make_task(tmp_path))
    members = np.flatnonzero(images.train.labels == 0)
    counts = np.zeros(90)
    for seed in range(300):
        counts[knn.bank_indices(KNNEval(n_per_class=1), images, seed=seed)] += 1
    share = 300 / len(members)
    assert np.abs(counts[members] - share).max() < 5 * math.sqrt(share)


def test_limits_of_bank_and_queries(tmp_path: Path) -> None:
    task = make_task(tmp_path)
    details = run(task, bank=30, queries=9)["top1_k20"].details
    assert (details["bank"], details["queries"]) == (30, 9)
    drawn = knn.bank_indices(KNNEval(bank=30), open_labeled(task), seed=0)
    assert drawn == sorted(set(drawn))
    assert len(drawn) == 30


def parts(task: Task, indices: Any) -> list[Subset]:
    """The images `indices` of both splits, to be relabeled."""
    sources: Any = task.splits
    return [Subset(source, indices=np.asarray(indices)) for source in (sources.train, sources.val)]


def test_images_without_a_label_are_left_out(tmp_path: Path) -> None:
    task = make_task(tmp_path)
    train, val = parts(task, np.arange(40))
    for part in (train, val):
        assert part.labels is not None
        part.labels = np.where(np.arange(len(part)) % 2, part.labels, -1)
    few = make_task(tmp_path)
    few.splits = Splits(train, val, None)
    odd = make_task(tmp_path)
    every_second = parts(task, np.arange(1, 40, 2))
    odd.splits = Splits(every_second[0], every_second[1], None)
    assert values(run(few)) == values(run(odd))
    assert run(few)["top1_k20"].details["queries"] == 20


def _run_rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.save(values(run(make_task(Path(folder), cache=Path(folder) / "cache"))), f"{folder}/{rank}.pt")
    leave_group()


@pytest.mark.slow
def test_two_ranks_have_the_figures_of_one(tmp_path: Path) -> None:
    on_ranks(_run_rank, str(tmp_path))
    alone = values(run(make_task(tmp_path)))
    assert [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)] == [alone, alone]


def folder(root: Path, *, train: dict[str, int], val: dict[str, int]) -> FolderData:
    for split, classes in (("train", train), ("val", val)):
        for name, count in classes.items():
            for number in range(count):
                write(root / split / name / f"{number}.png", number)
    return FolderData(path=str(root), cache_dir=str(root.parent / "lists"), num_workers=0, holdout=0, max_bad_share=1)


def refusal(task: Task, **config: Any) -> str:
    """The error message, which comes before the network processes an image."""
    task.network.backbone.register_forward_pre_hook(lambda *_: pytest.fail("the network ran"))
    with pytest.raises(UserError) as caught:
        run(task, **config)
    text = str(caught.value)
    assert "\n" not in text
    assert text.endswith(".") or text.count(". ") == 0
    return text


def test_more_neighbors_than_images(tmp_path: Path) -> None:
    said = refusal(make_task(tmp_path), k=[20, 91])
    assert said == "eval.k=91: there are 90 training images to choose neighbors from; set eval.k to at most 90."
    assert run(make_task(tmp_path), k=[90]).keys() == {"top1_k90", "top5_k90"}


def test_more_images_of_each_class_than_exist(tmp_path: Path) -> None:
    data = folder(tmp_path / "images", train={"ant": 5, "bee": 2, "cat": 3}, val={"ant": 1, "bee": 1, "cat": 1})
    said = refusal(make_task(tmp_path, data), k=[1], n_per_class=4)
    assert said.startswith("eval.n_per_class=4: the class 'bee' has 2 training images; set it to at most 2, or to null")
    assert run(make_task(tmp_path, data), k=[1], n_per_class=2)["top1_k1"].details["bank"] == 6


def test_no_labels(tmp_path: Path) -> None:
    write(tmp_path / "images" / "0.png")
    data = FolderData(path=str(tmp_path / "images"), cache_dir=str(tmp_path / "lists"), num_workers=0)
    said = refusal(make_task(tmp_path, data))
    assert "have no labels (no labels: " in said
    assert "has no class folders" in said


def test_no_validation_images(tmp_path: Path) -> None:
    data = folder(tmp_path / "images", train={"ant": 2, "bee": 2}, val={})
    assert "there are no validation images; add a validation split, or set data.holdout" in refusal(
        make_task(tmp_path, data)
    )
    assert run(make_task(tmp_path, replace(data, holdout=0.5)), k=[2])["top1_k2"].details["queries"] == 2


@pytest.mark.parametrize(("train", "val"), [("dog", "cat"), ("cat", "dog")])
def test_other_classes_among_the_validation_images(tmp_path: Path, train: str, val: str) -> None:
    data = folder(tmp_path / "images", train={"ant": 1, train: 1}, val={"ant": 1, val: 1})
    said = refusal(make_task(tmp_path, data))
    assert "the class folder '" in said
    assert "' but not in '" in said
    assert "'cat'" in said or "'dog'" in said


@pytest.mark.parametrize(
    ("train", "val", "said"),
    [
        (["ant", "bee"], ["ant", "cat"], "the class 'bee' is among the training images but not among the validation"),
        (["ant"], ["ant", "cat"], "the class 'cat' is among the validation images but not among the training"),
        (["ant", "bee"], ["bee", "ant"], "validation images are in different orders"),
    ],
)
def test_sources_with_other_classes(tmp_path: Path, train: list[str], val: list[str], said: str) -> None:
    task = make_task(tmp_path)
    few = parts(task, np.arange(2))
    few[0].classes, few[1].classes = train, val
    task.splits = Splits(few[0], few[1], None)
    assert said in refusal(task)


def test_a_broken_image_is_named_and_left_out(tmp_path: Path) -> None:
    data = folder(tmp_path / "images", train={"ant": 3, "bee": 3}, val={"ant": 2, "bee": 2})
    for path in (tmp_path / "images" / "train/ant/1.png", tmp_path / "images" / "val/bee/0.png"):
        path.write_bytes(path.read_bytes()[:50])
    task = make_task(tmp_path, data)
    assert run(task, k=[2])["top1_k2"].details == {"bank": 5, "queries": 3, "classes": 2}
    assert "train/ant/1.png" in (task.output / "bad_images_train.txt").read_text()
    assert "val/bee/0.png" in (task.output / "bad_images_val.txt").read_text()
    with pytest.raises(UserError, match=r"^eval\.k=6: there are 5 training images .* set eval\.k to at most 5\.$"):
        run(task, k=[6])


def test_nothing_but_broken_images(tmp_path: Path) -> None:
    data = folder(tmp_path / "images", train={"ant": 1, "bee": 1}, val={"ant": 1, "bee": 1})
    for path in (tmp_path / "images" / "val").rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match=r"^data: none of the validation images can be read, see .*_val\.txt\.$"):
        run(make_task(tmp_path, data), k=[1])
