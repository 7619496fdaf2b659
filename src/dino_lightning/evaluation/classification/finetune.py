"""`eval=finetune`: all weights trained with labels by the recipe of DeiT, from a checkpoint or from scratch.

AdamW with a learning rate that falls from layer to layer, a warm-up and a cosine per step, RandAugment, random erasing,
mixup and CutMix, smoothed labels, stochastic depth, and if wanted a moving average of the weights. Gradients are not
clipped. The figures are those of the last epoch.

    finetune/last.ckpt                 after each epoch: all that the training needs to go on
    finetune/epochs.jsonl              a line for each epoch: loss, learning rate, accuracies
    finetune/finetuned.safetensors     the final weights by timm's names, with those of the classes
    finetune/finetuned_ema.safetensors those of the moving average

(`finetune_untrained/` for the untrained baseline.) What is drawn depends on the seed and on the epoch, step or image
alone, so a training that goes on after an interruption ends with the weights of one without.
"""

import json
import math
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from timm.utils import ModelEmaV3, distribute_bn
from torch import Tensor, nn

from dino_lightning.config import DataConfig, FinetuneEval
from dino_lightning.data.batches import crop_seed
from dino_lightning.errors import UserError
from dino_lightning.evaluation.classification.classifiers import count_right, guesses
from dino_lightning.evaluation.classification.finetune_files import export, read_state, settings_of, write_state
from dino_lightning.evaluation.classification.finetune_recipe import (
    Augmentation,
    Targets,
    check_whole_batch,
    optimizer_of,
    schedule,
    set_rate,
    with_classifier,
)
from dino_lightning.evaluation.classification.splits import Labeled, labeled_sources
from dino_lightning.evaluation.classification.training_images import TrainingImages, TrainingLoader
from dino_lightning.evaluation.context import Result, Task
from dino_lightning.evaluation.features.extract import features_of_batches
from dino_lightning.evaluation.features.images import BROKEN, ViewedImages, center_view
from dino_lightning.runtime.collectives import all_reduce_mean, all_reduce_sum, rank, world_size
from dino_lightning.runtime.files import write_atomically

CHOSEN = "the test images: too good by the choice"


def evaluate(config: FinetuneEval, task: Task) -> Iterator[Result]:
    """`top1` and `top5` after the last epoch, `top1_ema` and `top5_ema` with a moving average, `top1_best_epoch`."""
    images = labeled_sources(task)
    training = Finetuning(config, task, images)
    history = training.run()
    files = training.export()
    details = {
        "classes": len(images.classes),
        "train_images": len(images.known("train")),
        "val_images": history[-1]["val_images"],
        "epochs": history,
        **files,
    }
    for metric in history[-1]["accuracy"]:
        yield Result(metric, history[-1]["accuracy"][metric], main=True, details=details)
        details = {}
    best = max((entry for entry in history if "accuracy" in entry), key=lambda entry: entry["accuracy"]["top1"])
    yield Result("top1_best_epoch", best["accuracy"]["top1"], details={"epoch": best["epoch"], "chosen_on": CHOSEN})


class Finetuning:
    """Network, optimizer, schedule, images, and the file that holds them between epochs."""

    def __init__(self, config: FinetuneEval, task: Task, images: Labeled) -> None:
        self.config, self.task, self.images = config, task, images
        self.device, network = task.runtime.device, task.network
        self.side = config.image_size or network.size
        known = len(images.known("train"))
        check_whole_batch(known, batch_size=config.batch_size_per_device, ranks=world_size())
        augmentation = Augmentation(config, network, size=self.side)
        self.model, self.classifier = with_classifier(
            network, drop_path_rate=config.drop_path_rate, classes=len(images.classes), seed=task.seed
        )
        self.adamw = optimizer_of(self.model, config)
        self.loader = self._loader(augmentation)
        self.rate = schedule(config, steps_per_epoch=len(self.loader), world_size=world_size())
        self.targets = Targets(config, classes=len(images.classes), seed=task.seed)
        self.module, self.optimizer = cast(tuple[Any, Any], task.runtime.fabric.setup(self.model, self.adamw))
        self.ema = ModelEmaV3(self.model, config.ema_decay) if config.ema_decay else None
        self.folder = task.output / ("finetune" if network.trained else "finetune_untrained")
        self.settings = settings_of(config, task, images)
        self.epoch, self.history = 0, []
        self._resume()

    def run(self) -> list[dict[str, Any]]:
        """Train to the last epoch: what is known of each, counted from 1."""
        config, steps = self.config, len(self.loader)
        with self.task.runtime.progress("Finetuning", total=config.epochs * steps) as advance:
            advance(self.epoch * steps)
            for epoch in range(self.epoch, config.epochs):
                entry: dict[str, Any] = {"epoch": epoch + 1, "train_loss": self._train(epoch, advance)}
                entry["lr"] = self.rate((epoch + 1) * steps - 1)
                if (epoch + 1) % config.val_every_n_epochs == 0 or epoch == config.epochs - 1:
                    entry |= self._tested()
                self.history.append(entry)
                self.epoch = epoch + 1
                self._save()
        return self.history

    def _train(self, epoch: int, advance: Callable[[int], None]) -> float:
        """One epoch; the mean loss of its steps over all ranks."""
        self.module.train()
        total = torch.zeros((), device=self.device)
        with torch.random.fork_rng(devices=[]):
            # For stochastic depth, of each rank its own.
            torch.manual_seed(crop_seed(self.task.seed, epoch, rank()))
            for number, (images_BCHW, labels_B) in enumerate(self.loader.epoch(epoch)):
                step = epoch * len(self.loader) + number
                total += self._step(images_BCHW.to(self.device, non_blocking=True), labels_B, step=step)
                advance(1)
        if world_size() > 1:
            for model in self._models().values():
                distribute_bn(model, world_size(), reduce=True)
        loss = float(all_reduce_mean(total)) / len(self.loader)
        if not math.isfinite(loss):
            raise UserError(
                f"eval.lr={self.config.lr:g}: the loss is no longer a number in epoch {epoch + 1}; set a "
                "lower one, or a longer eval.warmup_epochs."
            )
        return loss

    def _step(self, images_BCHW: Tensor, labels_B: Tensor, *, step: int) -> Tensor:
        set_rate(self.adamw, self.rate(step))
        loss = self._loss(images_BCHW, labels_B.to(self.device, non_blocking=True), step=step)
        self.optimizer.zero_grad()
        self.task.runtime.fabric.backward(loss)
        self.optimizer.step()
        if self.ema is not None:
            self.ema.update(self.model)
        return loss.detach()

    def _loss(self, images_BCHW: Tensor, labels_B: Tensor, *, step: int) -> Tensor:
        if not len(labels_B):  # all broken; the other ranks still wait for this one's gradients
            return 0.0 * self.module(images_BCHW.new_zeros(2, *images_BCHW.shape[1:])).float().sum()
        images_BCHW, targets = self.targets(images_BCHW, labels_B, step=step)
        return self.targets.loss(self.module(images_BCHW).float(), targets)

    def _tested(self) -> dict[str, Any]:
        """Per cent right with one guess and, of five classes or more, five; each validation image counts once."""
        found: dict[str, float] = {}
        images = 0
        for suffix, model in self._models().items():
            right, images = self._count_right(model.eval())
            found |= {f"top{k}{suffix}": 100 * n / images for k, n in right.items()}
        return {"accuracy": found, "val_images": images}

    def _count_right(self, model: nn.Module) -> tuple[dict[int, int], int]:
        runtime, topk = self.task.runtime, guesses(len(self.images.classes))
        dtype = next(model.parameters()).dtype
        own, size = self.images.known("val")[rank() :: world_size()], self.config.batch_size_per_device
        counts = torch.zeros(len(topk) + 1, dtype=torch.int64)
        for logits_BK, labels_B in features_of_batches(
            runtime.forward(lambda images: model(images.to(dtype))),
            self._validation_images(),
            batches=[own[start : start + size] for start in range(0, len(own), size)],
            num_workers=self.task.num_workers,
            device=self.device,
        ):
            read = labels_B != BROKEN
            right = count_right(logits_BK[read], labels_B[read], topk=topk)
            counts += torch.cat([right, read.sum()[None]])
        *right, images = all_reduce_sum(counts).tolist()
        if not images:
            raise UserError("data: none of the validation images can be read; see bad_images_val.txt.")
        return dict(zip(topk, right, strict=True)), images

    def _loader(self, augmentation: Augmentation) -> TrainingLoader:
        augmented = TrainingImages(
            self.images.train,
            augmentation,
            seed=self.task.seed,
            blank=(self.task.network.channels, self.side, self.side),
            config=cast(DataConfig, self.task.data),
            bad_images=self.task.output / "bad_images_train.txt",
        )
        return TrainingLoader(
            augmented,
            batch_size=self.config.batch_size_per_device,
            num_workers=self.task.num_workers,
            device=self.device,
            drop_last=True,
            repeats=self.config.repeated_augmentation,
        )

    def _validation_images(self) -> ViewedImages:
        return ViewedImages(
            self.images.val,
            center_view(self.task.network, resize=self.config.image_resize, size=self.config.image_size),
            blank=(self.task.network.channels, self.side, self.side),
            config=cast(DataConfig, self.task.data),
            bad_images=self.task.output / "bad_images_val.txt",
        )

    def _models(self) -> dict[str, nn.Module]:
        """The network, and its moving average; by the ends of their metrics' names."""
        return {"": self.model} | ({"_ema": self.ema.module} if self.ema is not None else {})

    def _save(self) -> None:
        if not self.task.runtime.is_main:
            return
        state = {
            "settings": self.settings,
            "epoch": self.epoch,
            "history": self.history,
            "model": self.model.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema is not None else None,
            "optimizer": self.adamw.state_dict(),
            "precision": self.task.runtime.fabric.strategy.precision.state_dict(),
        }
        write_state(self.folder / "last.ckpt", state)
        write_atomically(self.folder / "epochs.jsonl", "".join(json.dumps(entry) + "\n" for entry in self.history))

    def _resume(self) -> None:
        runtime = self.task.runtime
        state = read_state(self.folder / "last.ckpt", runtime, settings=self.settings)
        if state is None:
            return
        self.model.load_state_dict(state["model"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
        self.adamw.load_state_dict(state["optimizer"])
        runtime.fabric.strategy.precision.load_state_dict(state["precision"])
        self.epoch, self.history = state["epoch"], state["history"]
        runtime.say(f"Going on after epoch {self.epoch} of {self.config.epochs}: {self.folder / 'last.ckpt'}")

    def export(self) -> dict[str, str]:
        """Write the final weights: their names and files."""
        view = center_view(self.task.network, resize=self.config.image_resize, size=self.config.image_size).config
        files = {}
        for suffix, model in self._models().items():
            path = files[f"weights{suffix}"] = self.folder / f"finetuned{suffix}.safetensors"
            if self.task.runtime.is_main:
                size = [view.eval_resize, view.eval_size]
                classes = self.images.classes
                export(model, path, task=self.task, classes=classes, classifier=self.classifier, size=size)
        return {name: str(path) for name, path in files.items()}
