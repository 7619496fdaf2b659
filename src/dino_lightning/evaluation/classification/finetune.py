"""`eval=finetune`: all weights trained with labels, with the recipe of DeiT, from a checkpoint or from scratch.

AdamW with layer-wise learning-rate decay, warm-up and cosine per step, RandAugment, random erasing, mixup and CutMix,
label smoothing, stochastic depth, and optionally an exponential moving average (EMA) of the weights. Gradients are not
clipped. The main figures are those of the last epoch.

    finetune/last.ckpt                 after each epoch: the state from which the training resumes
    finetune/epochs.jsonl              one line per epoch: loss, learning rate, accuracies
    finetune/finetuned.safetensors     the final weights with timm's names, including the classifier
    finetune/finetuned_ema.safetensors those of the moving average

(`finetune_untrained/` for the untrained baseline.) Random draws depend only on the seed and the epoch, step or image,
so a resumed training ends with the same weights as an uninterrupted one.
"""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any, cast

import torch
from safetensors.torch import save
from timm.utils import ModelEmaV3, distribute_bn
from torch import Tensor, nn

from dino_lightning.config import FinetuneEval, ImagesConfig
from dino_lightning.data.batches import crop_seed
from dino_lightning.data.sources.base import content_digest
from dino_lightning.errors import UserError
from dino_lightning.evaluation.classification.classifiers import accuracy_topk, count_correct, read_state, write_state
from dino_lightning.evaluation.classification.finetune_recipe import (
    FinetuneAugmentation,
    Targets,
    add_classifier,
    build_optimizer,
    check_full_batch,
    learning_rate_schedule,
    set_learning_rate,
)
from dino_lightning.evaluation.classification.splits import LabeledSplits, open_labeled, split_images
from dino_lightning.evaluation.classification.training_images import training_loader
from dino_lightning.evaluation.context import Result, Task
from dino_lightning.evaluation.features.extract import extract_batches
from dino_lightning.evaluation.features.images import BROKEN, center_view
from dino_lightning.evaluation.registry import register_evaluation
from dino_lightning.runtime.collectives import all_reduce_mean, all_reduce_sum, rank, world_size
from dino_lightning.runtime.files import atomic_file, write_atomically

CHANGEABLE = ("val_every_n_epochs",)
"""Settings that may change on resuming because the weights do not depend on them."""


def check(config: FinetuneEval, data: ImagesConfig) -> None:
    """Raise `UserError` for a warm-up that is longer than the training."""
    if config.warmup_epochs > config.epochs:
        raise UserError(
            f"eval.warmup_epochs={config.warmup_epochs} is longer than eval.epochs={config.epochs}; set it to at most "
            f"{config.epochs}."
        )


@register_evaluation("finetune", FinetuneEval, check=check)
def evaluate(config: FinetuneEval, task: Task) -> Iterator[Result]:
    """`top1` and `top5` after the last epoch, `top1_ema` and `top5_ema` with a moving average, `top1_best_epoch`."""
    images = open_labeled(task)
    training = Finetuning(config, task, images)
    history = training.run()
    details = {
        "classes": len(images.classes),
        "train_images": len(images.labeled_indices("train")),
        "val_images": history[-1]["val_images"],
        "epochs": history,
        **training.export(),
    }
    for metric, value in history[-1]["accuracy"].items():
        yield Result(metric, value, main=True, details=details)
        details = {}
    best = max((entry for entry in history if "accuracy" in entry), key=lambda entry: entry["accuracy"]["top1"])
    details = {"epoch": best["epoch"], "chosen_on": "the test images: biased upwards"}
    yield Result("top1_best_epoch", best["accuracy"]["top1"], details=details)


class Finetuning:
    """Network, optimizer, schedule, images, and the file that stores the state between epochs."""

    def __init__(self, config: FinetuneEval, task: Task, images: LabeledSplits) -> None:
        self.config, self.task, self.images = config, task, images
        self.device, network = task.context.device, task.network
        side = config.image_size or network.size
        labeled = len(images.labeled_indices("train"))
        check_full_batch(labeled, batch_size=config.batch_size_per_device, ranks=world_size())
        augmentation = FinetuneAugmentation(config, network, size=side)
        self.model, self.classifier = add_classifier(
            network, drop_path_rate=config.drop_path_rate, classes=len(images.classes), seed=task.seed
        )
        self.adamw = build_optimizer(self.model, config)
        self.loader = training_loader(
            task,
            images.train,
            augmentation,
            side=side,
            batch_size=config.batch_size_per_device,
            drop_last=True,
            repeats=config.repeated_augmentation,
        )
        self.lr = learning_rate_schedule(config, steps_per_epoch=len(self.loader), world_size=world_size())
        self.targets = Targets(config, classes=len(images.classes), seed=task.seed)
        self.module, self.optimizer = cast(tuple[Any, Any], task.context.fabric.setup(self.model, self.adamw))
        self.ema = ModelEmaV3(self.model, config.ema_decay) if config.ema_decay else None
        self.folder = task.output / ("finetune" if network.trained else "finetune_untrained")
        self.settings = training_settings(config, task, images)
        self.epoch, self.history = 0, []
        self._resume()

    def run(self) -> list[dict[str, Any]]:
        """Train to the last epoch; returns loss, learning rate and accuracies of each epoch, counted from 1."""
        config, steps = self.config, len(self.loader)
        with self.task.context.progress("Finetuning", total=config.epochs * steps) as advance:
            advance(self.epoch * steps)
            for epoch in range(self.epoch, config.epochs):
                entry: dict[str, Any] = {"epoch": epoch + 1, "train_loss": self._train(epoch, advance)}
                entry["lr"] = self.lr((epoch + 1) * steps - 1)
                if (epoch + 1) % config.val_every_n_epochs == 0 or epoch == config.epochs - 1:
                    entry |= self._test()
                self.history.append(entry)
                self.epoch = epoch + 1
                self._save()
        return self.history

    def _train(self, epoch: int, advance: Callable[[int], None]) -> float:
        """Train for one epoch; returns the mean loss of its steps over all ranks."""
        self.module.train()
        total = torch.zeros((), device=self.device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(crop_seed(self.task.seed, epoch, rank()))  # stochastic depth differs between ranks
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
                f"eval.lr={self.config.lr:g}: the loss is NaN or infinite in epoch {epoch + 1}; set a lower learning "
                "rate, or a longer eval.warmup_epochs."
            )
        return loss

    def _step(self, images_BCHW: Tensor, labels_B: Tensor, *, step: int) -> Tensor:
        set_learning_rate(self.adamw, self.lr(step))
        loss = self._loss(images_BCHW, labels_B.to(self.device, non_blocking=True), step=step)
        self.optimizer.zero_grad()
        self.task.context.fabric.backward(loss)
        self.optimizer.step()
        if self.ema is not None:
            self.ema.update(self.model)
        return loss.detach()

    def _loss(self, images_BCHW: Tensor, labels_B: Tensor, *, step: int) -> Tensor:
        if not len(labels_B):  # all unreadable; the other ranks still wait for the gradients of this one
            return 0.0 * self.module(images_BCHW.new_zeros(2, *images_BCHW.shape[1:])).float().sum()
        images_BCHW, targets = self.targets(images_BCHW, labels_B, step=step)
        return self.targets.loss(self.module(images_BCHW).float(), targets)

    def _test(self) -> dict[str, Any]:
        """Top-1 accuracy in percent and, of five classes or more, top-5; each validation image counts once."""
        accuracy: dict[str, float] = {}
        images = 0
        for suffix, model in self._models().items():
            correct, images = self._count_correct(model.eval())
            accuracy |= {f"top{k}{suffix}": 100 * n / images for k, n in correct.items()}
        return {"accuracy": accuracy, "val_images": images}

    def _count_correct(self, model: nn.Module) -> tuple[dict[int, int], int]:
        """The number of correct images for each k of top-k, and the number of readable images, over all ranks."""
        context, topk = self.task.context, accuracy_topk(len(self.images.classes))
        dtype = next(model.parameters()).dtype
        indices = self.images.labeled_indices("val")[rank() :: world_size()]
        size = self.config.batch_size_per_device
        counts = torch.zeros(len(topk) + 1, dtype=torch.int64)
        for logits_BK, labels_B in extract_batches(
            context.forward(lambda images: model(images.to(dtype))),
            split_images(self.task, self.images.val, self.config, split="val"),
            batches=[indices[start : start + size] for start in range(0, len(indices), size)],
            num_workers=self.task.num_workers,
            device=self.device,
        ):
            readable = labels_B != BROKEN
            correct = count_correct(logits_BK[readable], labels_B[readable], topk=topk)
            counts += torch.cat([correct, readable.sum()[None]])
        *correct, images = all_reduce_sum(counts).tolist()
        if not images:
            raise UserError("data: none of the validation images can be read; see bad_images_val.txt.")
        return dict(zip(topk, correct, strict=True)), images

    def _models(self) -> dict[str, nn.Module]:
        """The network and its moving average, by the suffix of their metrics."""
        return {"": self.model} | ({"_ema": self.ema.module} if self.ema is not None else {})

    def _save(self) -> None:
        if not self.task.context.is_main:
            return
        state = {
            "settings": self.settings,
            "epoch": self.epoch,
            "history": self.history,
            "model": self.model.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema is not None else None,
            "optimizer": self.adamw.state_dict(),
            "precision": self.task.context.fabric.strategy.precision.state_dict(),
        }
        write_state(self.folder / "last.ckpt", state)
        write_atomically(self.folder / "epochs.jsonl", "".join(json.dumps(entry) + "\n" for entry in self.history))

    def _resume(self) -> None:
        context, file = self.task.context, self.folder / "last.ckpt"
        state = read_state(file, context)
        if state is None:
            return
        for key, value in self.settings.items():
            saved = state["settings"].get(key)
            if saved != value:
                raise UserError(
                    f"{key}={value}: {file} belongs to a training with {key}={saved}; set another output_dir, or "
                    "delete the file."
                )
        self.model.load_state_dict(state["model"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
        self.adamw.load_state_dict(state["optimizer"])
        context.fabric.strategy.precision.load_state_dict(state["precision"])
        self.epoch, self.history = state["epoch"], state["history"]
        context.say(f"Resuming after epoch {self.epoch} of {self.config.epochs}: {file}")

    def export(self) -> dict[str, str]:
        """Write the final weights; returns `weights` and, with a moving average, `weights_ema`: their paths.

        The weights have timm's names. The metadata are `classifier`, the name of the top layer, and as JSON: `classes`,
        the names of its outputs; `mean` and `std` of the images; `eval`, their shorter side and center crop (pixels);
        `network`, the architecture, so that `checkpoint=` can load the file.
        """
        network = self.task.network
        view = center_view(network, resize=self.config.image_resize, size=self.config.image_size).config
        size = {"resize": view.eval_resize, "size": view.eval_size}
        values = {"classes": self.images.classes, "mean": network.mean, "std": network.std, "eval": size}
        if network.description is not None:
            values["network"] = network.description | size
        metadata = {"format": "pt", "classifier": self.classifier}
        metadata |= {key: json.dumps(value) for key, value in values.items()}
        paths = {}
        for suffix, model in self._models().items():
            path = self.folder / f"finetuned{suffix}.safetensors"
            paths[f"weights{suffix}"] = str(path)
            if self.task.context.is_main:
                weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
                with atomic_file(path) as file:
                    file.write(save(weights, metadata=metadata))
        return paths


def training_settings(config: FinetuneEval, task: Task, images: LabeledSplits) -> dict[str, Any]:
    """All settings that the weights depend on, by their keys on the command line; the same on every rank."""
    fabric = task.context.fabric
    names = json.dumps(images.classes).encode()
    data = content_digest(images.train.fingerprint().encode(), names) if task.context.is_main else ""
    return {
        "checkpoint": task.network.digest,
        "data": fabric.broadcast(data),
        "seed": task.seed,
        "trainer.devices": world_size(),
        "trainer.precision": str(fabric.strategy.precision.precision),
        **{f"eval.{key}": value for key, value in asdict(config).items() if key not in CHANGEABLE},
    }
