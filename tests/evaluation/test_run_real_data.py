"""Every evaluation on whole real data sets, by the command's own path; minutes each (`pytest -m slow`).

The networks are untrained, so that the tests need no checkpoint: held is that each evaluation goes through a real data
set to figures between chance and perfect. The figures of trained networks are in docs/results.md.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from composing import composed_evaluation

from dino_lightning.evaluation.run import run_evaluation

pytestmark = pytest.mark.slow

NETWORK = "untrained:vit_micro"
SMALL_IMAGES = ["eval.image_size=32", "eval.image_resize=36", "data.num_workers=1"]

CLASSIFICATION: dict[str, list[str]] = {
    "knn": [],
    "logistic": ["eval.splits=1", "eval.c=[1.0]"],
    "linear_grid": ["eval.epochs=2", "eval.n_last_blocks=[1]"],
    "linear": ["eval.epochs=1", "eval.n_last_blocks=1"],
    "finetune": ["eval.epochs=1", "eval.warmup_epochs=0"],
    "neighbors": [],
}


def results(output: Path) -> dict[str, dict[str, Any]]:
    lines = [json.loads(text) for text in (output / "results.jsonl").read_text().splitlines()]
    return {line["metric"]: line for line in lines}


def evaluate(output: Path, *words: str) -> tuple[float | None, dict[str, dict[str, Any]]]:
    value = run_evaluation(
        composed_evaluation(f"checkpoint={NETWORK}", *words, output_dir=output), overrides=list(words)
    )
    return value, results(output)


@pytest.mark.parametrize("name", list(CLASSIFICATION))
def test_imagenette(name: str, shared_data: Path, tmp_path: Path) -> None:
    words = ["data=parquet", f"data.path={shared_data / 'imagenette160'}", *SMALL_IMAGES, *CLASSIFICATION[name]]
    value, _ = evaluate(tmp_path, f"eval={name}", *words)
    assert value is not None
    assert 10.5 < value < 60  # ten classes, and a network that has learned nothing or for one epoch


def test_cifar10_knn_asks_every_image(shared_data: Path, tmp_path: Path) -> None:
    words = ["data=parquet", f"data.path={shared_data / 'cifar10'}", *SMALL_IMAGES]
    value, found = evaluate(tmp_path, "eval=knn", *words)
    assert value is not None
    assert 15 < value < 60
    assert found["top1_k20"]["details"] == {"bank": 50_000, "queries": 10_000, "classes": 10}


def test_attention_on_voc(shared_data: Path, tmp_path: Path) -> None:
    words = ["eval=attention", "data=voc", f"data.path={shared_data / 'voc_labelme3'}", "eval.image_size=160"]
    value, found = evaluate(tmp_path, *words)
    assert value is not None
    assert 0 < value < 100
    assert {"jaccard_best_head_60", "jaccard_mean_head_80"} <= set(found)
    assert (tmp_path / "pictures" / "heads_untrained.png").exists()


@pytest.mark.parametrize("year", [2016, 2017])
def test_video_on_davis(year: int, shared_data: Path, tmp_path: Path) -> None:
    words = [f"data.path={shared_data / 'davis_mini6'}", f"data.year={year}", "eval.image_size=192"]
    value, found = evaluate(tmp_path, "eval=video", *words)
    assert value == pytest.approx((found["j_mean"]["value"] + found["f_mean"]["value"]) / 2)
    assert 10 < value < 90
    assert len(list((tmp_path / "masks_untrained").glob("*/*.png"))) == 379
