"""The k-NN callback in tiny trainings: what it logs, when, and that it does not change the training."""

import random
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from knn_training import Backbone, Data, Method, fit, knn_config
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from ranks import on_ranks
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor
from torch.utils.data import Subset

from dino_lightning.errors import UserError
from dino_lightning.runtime.collectives import leave_group
from dino_lightning.training.callbacks.knn import KNNCallback, evaluating

NAMES = {"top1", "top5", "top1_k3", "top5_k3", "top1_k10", "top5_k10"}


def _rows(trainer: Trainer) -> dict[int, str]:
    """`knn/top1` in `metrics.csv` by step."""
    assert trainer.logger is not None
    assert trainer.logger.log_dir is not None
    header, *rows = [
        line.split(",") for line in (Path(trainer.logger.log_dir) / "metrics.csv").read_text().splitlines()
    ]
    return {int(row[header.index("step")]): row[header.index("knn/top1")] for row in rows}


class Watch(Callback):
    """Calls the k-NN callback's hooks, and compares the state before with the state after."""

    def __init__(self, knn: KNNCallback) -> None:
        self.knn, self.calls = knn, 0

    def _state(self, module: LightningModule) -> tuple[dict[str, Tensor], list[bool], tuple]:
        tensors = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        numpy_state: Any = np.random.get_state()
        states = (random.getstate(), numpy_state[1].tolist(), torch.get_rng_state().tolist())
        return tensors, [part.training for part in module.modules()], states

    def _compare(self, hook: str, trainer: Trainer, module: LightningModule) -> None:
        tensors, flags, states = self._state(module)
        getattr(self.knn, hook)(trainer, module)
        tensors_after, flags_after, states_after = self._state(module)
        for name, tensor in tensors.items():
            assert torch.equal(tensor, tensors_after[name]), name
        assert flags == flags_after
        assert not all(flags), "the frozen batch norm is in eval mode throughout"
        assert any(flags)
        assert states == states_after
        self.calls += 1

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == 0:
            self._compare("on_train_start", trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._compare("on_train_epoch_end", trainer, pl_module)


def test_an_evaluation_leaves_everything_as_it_was(tmp_path: Path) -> None:
    watch = Watch(KNNCallback(knn_config()))
    fit(tmp_path, [watch])
    assert watch.calls == 3
    assert watch.knn.last
    assert watch.knn.untrained


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.slow
def test_training_is_the_same_with_and_without_it(tmp_path: Path, num_workers: int) -> None:
    data = Data()
    data.config.num_workers = num_workers
    _, alone = fit(tmp_path / "alone", [], data=data)
    _, watched = fit(tmp_path / "watched", [KNNCallback(knn_config())], data=data)
    assert alone.losses == watched.losses
    for a, b in zip(alone.state_dict().values(), watched.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def _by_hand(features: Any, data: Data, *, k: int) -> float:
    """Top-1 accuracy in percent by scikit-learn, from features of all images in one batch."""
    train, val = data.sets["train"], data.sets["val"]
    with torch.no_grad():
        bank, queries = features(train.images[:60]).numpy(), features(val.images[:20]).numpy()
    theirs = KNeighborsClassifier(k, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.07))
    return 100 * theirs.fit(bank, train.labels[:60].numpy()).score(queries, val.labels[:20].numpy())


def test_results_are_those_of_the_labeled_images(tmp_path: Path) -> None:
    knn, data = KNNCallback(knn_config()), Data()
    trainer, method = fit(tmp_path, [knn], data=data, max_epochs=6)
    assert set(knn.last) == set(knn.untrained) == set(knn.pixels) == NAMES
    seed_everything(0, verbose=False)
    untrained = Method().teacher.backbone.eval()

    def pixels(images: Tensor) -> Tensor:
        return F.interpolate(images, (32, 32), mode="bilinear", antialias=True).flatten(1)

    for k in (3, 10):
        assert knn.last[f"top1_k{k}"] == pytest.approx(_by_hand(method.teacher.backbone.eval(), data, k=k))
        assert knn.untrained[f"top1_k{k}"] == pytest.approx(_by_hand(untrained, data, k=k))
        assert knn.pixels[f"top1_k{k}"] == pytest.approx(_by_hand(pixels, data, k=k))
    assert knn.last["top1"] == knn.last["top1_k3"]
    assert len({knn.last["top1"], knn.untrained["top1"], knn.pixels["top1"]}) > 1, "all alike: the test shows nothing"
    logged = {f"knn/{name}": value for name, value in knn.last.items()}
    assert {name: float(value) for name, value in trainer.callback_metrics.items()} == pytest.approx(logged)
    assert trainer.progress_bar_metrics == pytest.approx({"knn/top1": knn.last["top1"]})


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"max_epochs": 5}, [7, 15, 19]),  # 4 steps an epoch: after epochs 2 and 4, and after the last
        ({"max_epochs": -1, "max_steps": 10}, [7, 9]),  # the limit lies within epoch 3
        ({"max_epochs": 2}, [7]),  # the last epoch is due anyway: once
    ],
)
def test_evaluation_schedule(tmp_path: Path, settings: dict[str, Any], steps: list[int]) -> None:
    knn = KNNCallback(knn_config(every_n_epochs=2, baselines=False))
    trainer, _ = fit(tmp_path, [knn], **settings)
    rows = _rows(trainer)
    assert list(rows) == steps
    assert float(rows[steps[-1]]) == pytest.approx(knn.last["top1"])
    # Checkpoint callbacks read these, so the last value must exist before the run ends.
    assert {name: float(trainer.callback_metrics[f"knn/{name}"]) for name in NAMES} == pytest.approx(knn.last)
    assert knn.untrained == knn.pixels == {}


class StopAfter(ModelCheckpoint):
    """Requests a stop at the end of an epoch, after all other callbacks, as `EarlyStopping` does."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.should_stop = True


def test_a_run_that_another_callback_stops_is_evaluated_at_its_end(tmp_path: Path) -> None:
    knn = KNNCallback(knn_config(every_n_epochs=2, baselines=False))
    trainer, method = fit(tmp_path, [StopAfter(tmp_path), knn], enable_checkpointing=True, max_epochs=9)
    assert list(_rows(trainer)) == [3]
    assert knn.last["top1_k10"] == pytest.approx(_by_hand(method.teacher.backbone.eval(), Data(), k=10))


def test_checkpoints_see_the_result_and_a_resumed_run_keeps_it(tmp_path: Path) -> None:
    knn, folder = KNNCallback(knn_config()), tmp_path / "checkpoints"
    best = ModelCheckpoint(folder, filename="best", monitor="knn/top1", mode="max", enable_version_counter=False)
    fit(tmp_path, [best, knn], enable_checkpointing=True, max_epochs=1)
    saved = torch.load(folder / "best.ckpt", weights_only=True)
    assert saved["callbacks"]["KNNCallback"] == {**knn.state_dict(), "last_step": 4}
    assert best.best_model_score == pytest.approx(knn.last["top1"])

    class Refusing(KNNCallback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            self.at_start = self.state_dict()
            super().on_train_start(trainer, pl_module)

        @property
        def state_key(self) -> str:
            return "KNNCallback"

    resumed = Refusing(knn_config())
    fit(tmp_path / "resumed", [resumed], resume=folder / "best.ckpt", max_epochs=2)
    assert resumed.at_start == knn.state_dict()
    assert (resumed.untrained, resumed.pixels) == (knn.untrained, knn.pixels)
    assert resumed.last_step == 8


def test_a_resumed_run_does_not_evaluate_missing_baselines(tmp_path: Path) -> None:
    trainer, _ = fit(tmp_path, [KNNCallback(knn_config(baselines=False))], max_epochs=1)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    resumed = KNNCallback(knn_config())
    fit(tmp_path / "resumed", [resumed], resume=tmp_path / "last.ckpt")
    assert resumed.untrained == resumed.pixels == {}


def test_limits_draw_a_subset(tmp_path: Path) -> None:
    class Counting(Data):
        def eval_dataset(self, split: str) -> Any:
            self.seen: dict[str, list[int]] = getattr(self, "seen", {"train": [], "val": []})
            seen, images = self.seen[split], self.sets[split]

            class Noted(Subset):
                def __getitem__(self, i: int) -> tuple[Tensor, int]:
                    seen.append(i)
                    return images[i]

                __getitems__ = None  # the loader then asks one by one

            return Noted(images, range(len(images)))

    data = Counting()
    fit(tmp_path, [KNNCallback(knn_config(bank=12, queries=7, baselines=False))], data=data, max_epochs=1)
    assert [len(set(data.seen["train"])), len(data.seen["train"])] == [12, 12]
    assert max(data.seen["train"]) < 60, "an image without label came into the bank"
    assert len(data.seen["val"]) == 7


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_other_precisions(tmp_path: Path, precision: str) -> None:
    knn = KNNCallback(knn_config())
    fit(tmp_path, [knn], precision=precision, max_epochs=1)
    assert set(knn.last) == set(knn.untrained) == NAMES


def test_precision_of_the_run_is_used(tmp_path: Path) -> None:
    seen: list[torch.dtype] = []

    class Spying(KNNCallback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            linear: Any = pl_module.teacher.backbone[-1]  # pyright: ignore
            handle = linear.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
            super().on_train_epoch_end(trainer, pl_module)
            handle.remove()

    fit(tmp_path, [Spying(knn_config(baselines=False))], precision="bf16-mixed", max_epochs=1)
    assert set(seen) == {torch.bfloat16}


def test_without_labels_it_warns_and_does_nothing(tmp_path: Path) -> None:
    knn = KNNCallback(knn_config())
    trainer = SimpleNamespace(datamodule=Data(labeled=False))
    with pytest.warns(UserWarning, match="no labels"):
        knn.on_train_start(trainer, Method())  # pyright: ignore[reportArgumentType]
    fit(tmp_path, [knn], data=Data(labeled=False), max_epochs=1)
    assert knn.untrained == knn.last == {}


def test_disabled_it_does_nothing(tmp_path: Path) -> None:
    knn = KNNCallback(knn_config(enabled=False))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        knn.on_train_start(SimpleNamespace(datamodule=Data(labeled=False)), Method())  # pyright: ignore
    fit(tmp_path, [knn], max_epochs=1)
    assert knn.untrained == knn.last == {}


def test_no_validation_images_are_noticed_before_training(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs validation images"):
        fit(tmp_path, [KNNCallback(knn_config(baselines=False))], data=Data(n_val=0))


def test_evaluating_restores_modes_after_an_error() -> None:
    backbone = Backbone().train()
    backbone[4].eval()
    with pytest.raises(RuntimeError, match="shapes"), evaluating(backbone):
        backbone[-1](torch.zeros(2, 3))
    assert [part.training for part in backbone] == [True, True, True, True, False, True, True]


def _run_rank(rank: int, folder: str) -> None:
    knn = KNNCallback(knn_config())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer, _ = fit(Path(folder) / "two", [knn], ignore_warnings=False, max_epochs=1, devices=2, strategy="ddp")
    about_us = [str(warning.message) for warning in caught if "knn/" in str(warning.message)]
    result = {"state": knn.state_dict(), "logged": float(trainer.callback_metrics["knn/top1"]), "warnings": about_us}
    torch.save(result, f"{folder}/{rank}.pt")
    leave_group()


def test_two_ranks_agree_and_have_the_untrained_result_of_one(tmp_path: Path) -> None:
    """Under DDP, batches differ from those of one process, so the trained network does, too."""
    alone = KNNCallback(knn_config())
    fit(tmp_path / "alone", [alone], max_epochs=1)
    on_ranks(_run_rank, str(tmp_path))
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert first == second
    assert (first["state"]["untrained"], first["state"]["pixels"]) == (alone.untrained, alone.pixels)
    assert first["logged"] == pytest.approx(first["state"]["last"]["top1"])
    assert first["warnings"] == []
