"""`eval=linear`: a linear classifier trained on frozen features, exactly as the original trains it (section 4.1).

In each epoch the backbone sees each training image in a new crop (bilinear, unlike all other images of DINO) with a
random flip. SGD with momentum 0.9 and no weight decay; the learning rate, scaled by the total batch, follows a cosine
that moves once per epoch. Validation images are always seen alike: their features are extracted once, by all devices
together, and each tested epoch classifies them anew, which gives the original's figures at a fraction of the time.

After each epoch everything is in `linear/classifier_KEY.pt`, KEY standing for weights, images and settings. There is
no random state in it because none has to go on: see `training_images`. B images, D features, C classes.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision import transforms

from dino_lightning.config import CropsConfig, DataConfig, LinearEval
from dino_lightning.data.crops.pil import Normalized
from dino_lightning.data.sources.base import content_digest
from dino_lightning.errors import UserError
from dino_lightning.evaluation.classification.classifiers import (
    LinearClassifier,
    accuracy,
    guesses,
    read_classifier,
    write_classifier,
)
from dino_lightning.evaluation.classification.splits import Labeled, labeled_sources, viewed
from dino_lightning.evaluation.classification.training_images import TrainingImages, TrainingLoader
from dino_lightning.evaluation.context import Result, Task
from dino_lightning.evaluation.features.cache import cached_features
from dino_lightning.evaluation.features.choice import FeatureChoice
from dino_lightning.models.frozen import FrozenNetwork
from dino_lightning.runtime.collectives import all_reduce_mean, world_size

Test = Callable[[Callable[[Tensor], Tensor]], list[float]]
"""A classifier, features (B, D) -> logits (B, C) -> per cent right with 1 and, of five classes or more, 5 guesses."""


def evaluate(config: LinearEval, task: Task) -> Iterator[Result]:
    """`top1` and `top5` after the last epoch, and `top1_best_epoch`; or those of `config.classifier`."""
    images = labeled_sources(task)
    choice = FeatureChoice(config.n_last_blocks, config.avgpool)
    choice.check(task.network)
    given = None
    if config.classifier is not None:
        shape: dict[str, Any] = {"width": choice.width(task.network), "classes": len(images.classes)}
        given = read_classifier(Path(config.classifier).expanduser(), choice=choice, **shape)
    test, tested = validation(config, task, images, choice)
    details: dict[str, Any] = {
        "n_last_blocks": choice.n_last_blocks,
        "avgpool": choice.avgpool,
        "classes": len(images.classes),
        "val_images": tested,
    }
    if given is not None:
        yield from _results(test(given), details | {"classifier": config.classifier})
        return
    training = Training(config, task, images, choice)
    history = training.run(test)
    details |= {"train_images": len(images.known("train")), "classifier": str(training.file), "epochs": history}
    yield from _results(history[-1]["top"], details)
    best = max(history, key=lambda entry: entry["top"][0])
    yield Result(
        "top1_best_epoch",
        best["top"][0],
        details={"epoch": best["epoch"], "chosen_on": "the test images, as in the original: too good by the choice"},
    )


def _results(top: list[float], details: dict[str, Any]) -> Iterator[Result]:
    yield Result("top1", top[0], main=True, details=details)
    if len(top) > 1:
        yield Result("top5", top[1], main=True)


def validation(config: LinearEval, task: Task, images: Labeled, choice: FeatureChoice) -> tuple[Test, int]:
    """What tests a classifier, and on how many images."""
    features_MD, labels_M, _ = cached_features(
        task,
        task.runtime.forward(choice.of(task.network.backbone)),
        viewed(task, images.val, config, split="val"),
        what="validation images",
        kind=f"linear, {choice}",
        batch_size=config.batch_size_per_device,
        indices=images.known("val"),
    )
    if not len(labels_M):
        raise UserError(f"data: none of the validation images can be read, see {task.output / 'bad_images_val.txt'}.")
    topk, device = guesses(len(images.classes)), task.runtime.device

    def test(classify: Callable[[Tensor], Tensor]) -> list[float]:
        return accuracy(classify, features_MD, labels_M, topk=topk, device=device).tolist()

    return test, len(labels_M)


class Augmentation:
    """PIL image -> a random crop of `size` (bilinear), perhaps mirrored, normalized: (C, size, size)."""

    def __init__(self, network: FrozenNetwork, *, size: int) -> None:
        self.cut = transforms.Compose([transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()])
        self.finish = Normalized(CropsConfig(mean=network.mean, std=network.std))

    def __call__(self, image: Any) -> Tensor:
        """Draws from PyTorch's generator, as the original does."""
        return self.finish(self.cut(image))


class Training:
    """The classifier, its optimizer and schedule, and the file that holds them."""

    def __init__(self, config: LinearEval, task: Task, images: Labeled, choice: FeatureChoice) -> None:
        self.config, self.task, fabric = config, task, task.runtime.fabric
        network, side = task.network, config.image_size or task.network.size
        augmented = TrainingImages(
            images.train,
            Augmentation(network, size=side),
            seed=task.seed,
            blank=(network.channels, side, side),
            config=cast(DataConfig, task.data),
            bad_images=task.output / "bad_images_train.txt",
        )
        self.loader = TrainingLoader(
            augmented,
            batch_size=config.batch_size_per_device,
            num_workers=task.num_workers,
            device=task.runtime.device,
        )
        self.extract = task.runtime.forward(choice.of(network.backbone))
        self.width = choice.width(network)
        self.head = LinearClassifier(self.width, len(images.classes), seed=task.seed)
        lr = config.lr * config.batch_size_per_device * world_size() / 256
        sgd = torch.optim.SGD(self.head.parameters(), lr, momentum=0.9, weight_decay=0)
        self.module, self.optimizer = cast(tuple[Any, Any], fabric.setup(self.head, sgd))
        self.sgd, self.scheduler = sgd, torch.optim.lr_scheduler.CosineAnnealingLR(sgd, config.epochs, eta_min=0)
        self.file = task.output / "linear" / f"classifier_{self._key(images)}.pt"
        self.epoch, self.history = 0, []
        self._resume()

    def run(self, test: Test) -> list[dict[str, Any]]:
        """Train to the last epoch: the tested epochs, counted from 1, with their loss and accuracies."""
        steps, config = len(self.loader), self.config
        with self.task.runtime.progress("Linear classifier", total=config.epochs * steps) as advance:
            advance(self.epoch * steps)
            for epoch in range(self.epoch, config.epochs):
                loss = self._train(epoch, advance)
                self.scheduler.step()
                if epoch % config.val_every_n_epochs == 0 or epoch == config.epochs - 1:
                    self.history.append({"epoch": epoch + 1, "train_loss": loss, "top": self._tested(test)})
                self.epoch = epoch + 1
                self._save()
        return self.history

    def _train(self, epoch: int, advance: Callable[[int], None]) -> float:
        """One epoch; the mean loss of its batches over all ranks."""
        device, losses = self.task.runtime.device, []
        for images_BCHW, labels_B in self.loader.epoch(epoch):
            loss = self._loss(images_BCHW.to(device, non_blocking=True), labels_B.to(device, non_blocking=True))
            self.optimizer.zero_grad()
            self.task.runtime.fabric.backward(loss)
            self.optimizer.step()
            losses.append(loss.detach())
            advance(1)
        return float(all_reduce_mean(torch.stack(losses).mean()))

    def _loss(self, images_BCHW: Tensor, labels_B: Tensor) -> Tensor:
        if not len(labels_B):  # all broken; the other ranks still wait for this one's gradients
            return self.module(torch.zeros(0, self.width, device=labels_B.device)).sum()
        return F.cross_entropy(self.module(self.extract(images_BCHW)), labels_B)

    def _tested(self, test: Test) -> list[float]:
        weight_CD, bias_C = (parameter.detach().float() for parameter in self.head.parameters())
        return test(lambda features_BD: F.linear(features_BD, weight_CD, bias_C))

    def _key(self, images: Labeled) -> str:
        """Of all that the weights depend on."""
        config = self.config
        settings = {
            "network": self.task.network.digest,
            "mean": self.task.network.mean,
            "std": self.task.network.std,
            "size": config.image_size or self.task.network.size,
            "view": config.image_resize,
            "images": [images.train.fingerprint(), images.val.fingerprint()],
            "features": [config.n_last_blocks, config.avgpool],
            "training": [config.epochs, config.lr, config.batch_size_per_device, config.val_every_n_epochs],
            "ranks": world_size(),
            "seed": self.task.seed,
            "precision": str(self.task.runtime.fabric._precision.precision),
        }
        return content_digest(json.dumps(settings).encode())[:12]

    def _save(self) -> None:
        if self.task.runtime.is_main:
            best = max((entry["top"][0] for entry in self.history), default=0.0)
            write_classifier(
                self.file,
                self.head.linear.weight,
                self.head.linear.bias,
                optimizer=self.sgd.state_dict(),
                scheduler=self.scheduler.state_dict(),
                epoch=self.epoch,
                best_acc=best,
                history=self.history,
            )

    def _resume(self) -> None:
        """Go on from the file where there is one; the main process reads it for all."""
        runtime = self.task.runtime
        found = runtime.is_main and self.file.is_file()
        state = torch.load(self.file, map_location="cpu", weights_only=True) if found else None
        state = cast(dict[str, Any] | None, runtime.fabric.broadcast(state))
        if state is None:
            return
        weights = {key.removeprefix("module."): value for key, value in state["state_dict"].items()}
        self.head.load_state_dict(weights)
        self.sgd.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.epoch, self.history = state["epoch"], state["history"]
        runtime.say(f"Going on after epoch {self.epoch} of {self.config.epochs}: {self.file}")
