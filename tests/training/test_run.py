"""A complete run: its files, resuming, and its loggers."""

import csv
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import tifffile
import timm
import torch
import yaml
from composing import SMALL, composed
from safetensors import safe_open
from slow_params import first
from wandb_records import configuration, logged, offline_records

from dino_lightning.errors import UserError
from dino_lightning.training.run import train


def run(output: Path, *overrides: str) -> float | None:
    torch.manual_seed(0)
    return train(composed(*SMALL, *overrides, output_dir=output))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float | None]:
    output = tmp_path_factory.mktemp("run")
    return output, run(output)


def rows(output: Path) -> list[dict[str, str]]:
    with (output / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def column(output: Path, name: str) -> list[float]:
    return [float(row[name]) for row in rows(output) if row.get(name)]


def test_output_folder(finished: tuple[Path, float | None]) -> None:
    output, _ = finished
    names = {str(path.relative_to(output)) for path in output.rglob("*") if path.is_file()}
    expected = {"config.yaml", "metrics.csv", "summary.json", "report.html", "teacher.safetensors"}
    expected |= {f"checkpoints/{name}.ckpt" for name in ("last", "last-1", "best_knn")}
    expected |= {f"pictures/{name}.png" for name in ("crops", "attention", "pca", "neighbors")}
    assert names == expected


def test_summary(finished: tuple[Path, float | None]) -> None:
    output, returned = finished
    summary = json.loads((output / "summary.json").read_text())
    assert summary["knn_top1"] == returned == pytest.approx(column(output, "knn/top1")[-1])
    for key in ("knn_top1_untrained", "knn_top1_pixels"):
        assert 0 < summary[key] <= 100
    assert summary["images_per_second"] > 0
    assert (summary["steps"], summary["seed"], summary["bad_images"]) == (12, 0, 0)
    assert summary["collapse"] is None
    assert "commit" in summary


def test_config_is_resolved_and_runs_again(finished: tuple[Path, float | None]) -> None:
    output, _ = finished
    config = yaml.safe_load((output / "config.yaml").read_text())
    assert config["output_dir"] == str(output)
    assert config["data"]["train_images"] == 96
    assert "${" not in (output / "config.yaml").read_text()


def test_metrics_contain_losses_schedules_and_collapse_signals(finished: tuple[Path, float | None]) -> None:
    output, _ = finished
    assert len(column(output, "train/loss")) == 12
    assert len(column(output, "knn/top1")) == 2
    for name in ("lr", "weight_decay", "teacher_momentum", "teacher_temperature"):
        assert len(column(output, f"schedule/{name}")) == 12, name
    each_step = (
        "teacher_entropy",
        "teacher_student_kl",
        "mean_output_entropy",
        "kl_to_uniform",
        "feature_std",
        "center_norm",
        "alarm",
    )
    for name in each_step:
        assert len(column(output, f"collapse/{name}")) == 12, name
    for name in ("effective_rank", "dead_prototypes"):
        assert column(output, f"collapse/{name}"), name
    assert column(output, "schedule/lr")[0] == 0
    assert column(output, "speed/images_per_second")


def test_teacher_loads_into_timm(finished: tuple[Path, float | None]) -> None:
    output, _ = finished
    arguments = json.loads((output / "summary.json").read_text())["timm"]
    network = timm.create_model(**arguments, checkpoint_path=str(output / "teacher.safetensors")).eval()
    checkpoint = torch.load(output / "checkpoints" / "last.ckpt", weights_only=True)
    prefix = "teacher.backbone."
    trained = {name.removeprefix(prefix): w for name, w in checkpoint["state_dict"].items() if name.startswith(prefix)}
    assert trained.keys() == network.state_dict().keys()
    assert all(torch.equal(trained[name], weight) for name, weight in network.state_dict().items())
    with safe_open(output / "teacher.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["timm"]) == arguments


def test_the_checkpoint_is_safe_and_contains_the_center(finished: tuple[Path, float | None]) -> None:
    output, _ = finished
    checkpoint = torch.load(output / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["state_dict"]["center.center"].norm() > 0
    assert checkpoint["global_step"] == 12


def test_resume(tmp_path: Path) -> None:
    run(tmp_path, "trainer.max_steps=6", "callbacks.pictures.enabled=false")
    assert json.loads((tmp_path / "summary.json").read_text())["steps"] == 6
    before = rows(tmp_path)
    run(tmp_path, "resume=true", "callbacks.pictures.enabled=false")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["steps"] == 12
    assert len(column(tmp_path, "train/loss")) == 12
    assert [row["step"] for row in rows(tmp_path)][: len(before)] == [row["step"] for row in before]
    baseline = json.loads((tmp_path / "summary.json").read_text())["knn_top1_untrained"]
    assert baseline is not None


UNLABELED = [o for o in SMALL if not o.startswith(("data.train_images", "data.val_images"))]
UNLABELED += ["callbacks.knn.enabled=false", "callbacks.pictures.images=3"]


def test_unlabeled_photos(tmp_path: Path) -> None:
    from PIL import Image

    folder = tmp_path / "photos"
    folder.mkdir()
    for index in range(50):
        Image.effect_noise((60, 45), 40 + index).convert("RGB").save(folder / f"{index}.jpg")
    (folder / "broken.jpg").write_bytes(b"not a picture")
    words = [*UNLABELED, "data=folder", f"data.path={folder}", "experiment=quick"]
    assert train(composed(*words, output_dir=tmp_path / "run")) is None
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["knn_top1"] is None
    assert summary["bad_images"] == 1
    assert "broken.jpg" in (tmp_path / "run" / "bad_images.txt").read_text()
    assert (tmp_path / "run" / "pictures" / "neighbors.png").exists()


def test_broken_images_are_counted_per_split(tmp_path: Path) -> None:
    """Each split has its own file, so that the share of broken images is relative to the split."""
    for split, count in (("train", 40), ("val", 10)):
        for index in range(count):
            path = tmp_path / "in" / split / "ab"[index % 2] / f"{index}.tif"
            path.parent.mkdir(parents=True, exist_ok=True)
            tifffile.imwrite(path, np.random.default_rng(index).integers(0, 256, (40, 50, 3), dtype=np.uint8))
        path.write_bytes(b"not a picture")
    cfg = composed(
        *UNLABELED[:-2],
        "data=folder",
        "experiment=quick",
        f"data.path={tmp_path}/in",
        "callbacks.pictures.enabled=false",
        "data.max_bad_share=0.1",
        output_dir=tmp_path / "run",
    )
    train(cfg)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["bad_images"] == 2
    assert "train" in (tmp_path / "run" / "bad_images.txt").read_text()
    assert "val" in (tmp_path / "run" / "bad_images_val.txt").read_text()


def photos(folder: Path, *, channels: int, count: int = 48) -> Path:
    """TIFF images of noise with any number of channels."""
    folder.mkdir()
    for index in range(count):
        values = np.random.default_rng(index).integers(0, 256, (40, 50, channels), dtype=np.uint8)
        shape = {"photometric": "minisblack", "planarconfig": "contig"} if channels != 3 else {}
        tifffile.imwrite(folder / f"{index:02}.tif", values[..., 0] if channels == 1 else values, **shape)
    return folder


@pytest.mark.parametrize(
    ("channels", "backend"), first([(5, "device"), (5, "cpu"), (1, "pil"), (1, "cpu"), (1, "device")], fast=2)
)
@pytest.mark.slow_after_first(1)
def test_images_of_other_channels(
    channels: int, backend: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    half = "[" + ",".join(["0.5"] * channels) + "]"
    cfg = composed(
        *UNLABELED,
        "data=folder",
        f"data.path={photos(tmp_path / 'in', channels=channels)}",
        f"data.channels={channels}",
        f"crops={backend}",
        f"crops.mean={half}",
        f"crops.std={half}",
        "experiment=quick",
        output_dir=tmp_path / "run",
    )
    train(cfg)
    assert f"{channels} channels: no saturation, hue and grayscale" in " ".join(capfd.readouterr().err.split())
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["timm"]["in_chans"] == channels
    assert {path.stem for path in (tmp_path / "run" / "pictures").iterdir()} == {
        "crops",
        "attention",
        "pca",
        "neighbors",
    }


def test_a_stream(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "images-0.tar", "w") as tar:
        for path in sorted(photos(tmp_path / "in", channels=3).iterdir()):
            tar.add(path, arcname=path.name)
    cfg = composed(
        *UNLABELED,
        "data=webdataset",
        "experiment=quick",
        f"data.shards={tmp_path}/images-0.tar",
        "data.images=40",
        output_dir=tmp_path / "run",
    )
    train(cfg)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 2 * (40 // 16)
    assert (tmp_path / "run" / "pictures" / "neighbors.png").exists()


def test_16_bit_images_without_a_range_are_refused_before_the_run(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for index in range(20):
        deep = np.full((40, 50), 1000 * index, np.uint16)
        tifffile.imwrite(tmp_path / "in" / f"{index}.tif", deep)
    cfg = composed(*UNLABELED, "data=folder", f"data.path={tmp_path}/in", output_dir=tmp_path / "run")
    with pytest.raises(UserError, match=r"16-bit image; set data\.value_range, such as \[0,65535\]"):
        train(cfg)
    assert not [path for path in (tmp_path / "run").rglob("*") if path.is_file()]


@pytest.mark.slow
def test_the_same_seed_gives_the_same_run(finished: tuple[Path, float | None], tmp_path: Path) -> None:
    output, _ = finished
    run(tmp_path, "callbacks.pictures.enabled=false")
    assert column(tmp_path, "train/loss") == column(output, "train/loss")
    run(tmp_path / "other", "seed=1", "callbacks.pictures.enabled=false")
    assert column(tmp_path / "other", "train/loss") != column(output, "train/loss")


def test_paths_are_not_wrapped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / ("long" * 30)
    run(output, "trainer.max_epochs=1", "callbacks.pictures.enabled=false")
    shown = capsys.readouterr()
    assert f"Output    {output}\n" in shown.err
    assert f"Pictures and curves: {output / 'report.html'}\n" in shown.out


def test_a_checkpoint_of_every_epoch(tmp_path: Path) -> None:
    run(tmp_path, "callbacks.checkpoint.every_n_epochs=1", "callbacks.pictures.enabled=false")
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert names == {"last.ckpt", "last-1.ckpt", "best_knn.ckpt", "epoch0000.ckpt", "epoch0001.ckpt"}


@pytest.mark.slow
def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    run(tmp_path, "logger=tensorboard", "trainer.max_steps=2", "callbacks.pictures.enabled=false")
    assert list((tmp_path / "tensorboard").glob("events.*"))


@pytest.mark.slow
def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Besides `tests/loggers/test_wandb.py`: that an offline run stores all of its charts and pictures."""
    monkeypatch.setenv("WANDB_SILENT", "true")
    run(tmp_path, "logger=wandb", "trainer.max_steps=4")
    records = offline_records(tmp_path)
    found = logged(records)
    expected = {"train/loss", "schedule/lr", "schedule/weight_decay", "schedule/teacher_momentum"}
    expected |= {"schedule/teacher_temperature", "collapse/teacher_entropy", "collapse/teacher_student_kl"}
    expected |= {"collapse/center_norm", "collapse/feature_std", "knn/top1", "speed/images_per_second"}
    expected |= {"pictures/attention", "norm/gradient", "norm/student", "norm/teacher", "speed/data_wait_share"}
    assert expected <= {key for key in found} | {key.split("/_")[0] for key in found}
    assert len(found["train/loss"]) == 4
    assert {"commit", "command", "lightning"} <= configuration(records)["environment"].keys()
    assert list(tmp_path.glob("wandb/offline-run-*/files/media/images/pictures/attention*.png"))
