"""`eval=linear`: a linear classifier on frozen features, trained exactly as in the original (section 4.1).

In each epoch the backbone sees each training image in a new crop (bilinear, unlike all other images of DINO) with a
random flip. SGD with momentum 0.9 and no weight decay; the learning rate, scaled by the total batch, follows a cosine
that changes once per epoch. Validation images are not augmented, so their features are extracted once, by all devices
together, and classified again in each tested epoch: the figures of the original in a fraction of the time.

After each epoch, the state is written to `linear/classifier_KEY.pt`; KEY is a digest of weights, images and settings.
No random state is needed to resume (see `training_images`). B images, D features, C classes.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision import transforms

from dino_lightning.config import LinearEval
from dino_lightning.data.sources.base import content_digest
from dino_lightning.evaluation.classification.classifiers import (
    LinearClassifier,
    accuracy,
    accuracy_topk,
    read_classifier,
    read_state,
    top_results,
    write_classifier,
)
from dino_lightning.evaluation.classification.splits import LabeledSplits, open_labeled, split_features
from dino_lightning.evaluation.classification.training_images import training_loader
from dino_lightning.evaluation.context import Result, Task
from dino_lightning.evaluation.features.images import normalization
from dino_lightning.evaluation.features.spec import FeatureSpec
from dino_lightning.evaluation.registry import register_evaluation
from dino_lightning.runtime.collectives import all_reduce_mean, world_size

Test = Callable[[Callable[[Tensor], Tensor]], list[float]]
"""Tests a classifier, features (B, D) -> logits (B, C): top-1 accuracy in percent and, of at least 5 classes, top-5."""


@register_evaluation("linear", LinearEval)
def evaluate(config: LinearEval, task: Task) -> Iterator[Result]:
    """`top1` and `top5` after the last epoch, and `top1_best_epoch`; with `config.classifier` only its own figures."""
    images = open_labeled(task)
    spec = FeatureSpec(config.n_last_blocks, config.avgpool)
    spec.check(task.network)
    classifier = None
    if config.classifier is not None:
        path = Path(config.classifier).expanduser()
        classifier = read_classifier(path, width=spec.width(task.network), classes=len(images.classes), spec=spec)
    features_MD, labels_M = split_features(task, config, images, "val", spec=spec)
    topk, device = accuracy_topk(len(images.classes)), task.context.device

    def test(classify: Callable[[Tensor], Tensor]) -> list[float]:
        return accuracy(classify, features_MD, labels_M, topk=topk, device=device).tolist()

    details: dict[str, Any] = {
        "n_last_blocks": spec.n_last_blocks,
        "avgpool": spec.avgpool,
        "classes": len(images.classes),
        "val_images": len(labels_M),
    }
    if classifier is not None:
        yield from top_results(test(classifier), details | {"classifier": config.classifier})
        return
    training = LinearTraining(config, task, images, spec)
    history = training.run(test)
    train_images = len(images.labeled_indices("train"))
    details |= {"train_images": train_images, "classifier": str(training.file), "epochs": history}
    yield from top_results(history[-1]["top"], details)
    best = max(history, key=lambda entry: entry["top"][0])
    yield Result(
        "top1_best_epoch",
        best["top"][0],
        details={"epoch": best["epoch"], "chosen_on": "the test images, as in the original: biased upwards"},
    )


class LinearTraining:
    """The classifier, its optimizer and schedule, and the file that stores them."""

    def __init__(self, config: LinearEval, task: Task, images: LabeledSplits, spec: FeatureSpec) -> None:
        self.config, self.task, fabric = config, task, task.context.fabric
        network, side = task.network, config.image_size or task.network.size
        crop_and_flip = [transforms.RandomResizedCrop(side), transforms.RandomHorizontalFlip()]
        augmentation = transforms.Compose([*crop_and_flip, normalization(network)])
        self.loader = training_loader(
            task, images.train, augmentation, side=side, batch_size=config.batch_size_per_device
        )
        self.extract = task.context.forward(spec.of(network.backbone))
        self.width = spec.width(network)
        self.head = LinearClassifier(self.width, len(images.classes), seed=task.seed)
        lr = config.lr * config.batch_size_per_device * world_size() / 256
        sgd = torch.optim.SGD(self.head.parameters(), lr, momentum=0.9, weight_decay=0)
        self.module, self.optimizer = cast(tuple[Any, Any], fabric.setup(self.head, sgd))
        self.sgd, self.scheduler = sgd, torch.optim.lr_scheduler.CosineAnnealingLR(sgd, config.epochs, eta_min=0)
        self.file = task.output / "linear" / f"classifier_{self._key(images)}.pt"
        self.epoch, self.history = 0, []
        self._resume()

    def run(self, test: Test) -> list[dict[str, Any]]:
        """Train to the last epoch; returns the tested epochs, counted from 1, with their loss and accuracies."""
        steps, config = len(self.loader), self.config
        with self.task.context.progress("Linear classifier", total=config.epochs * steps) as advance:
            advance(self.epoch * steps)
            for epoch in range(self.epoch, config.epochs):
                loss = self._train(epoch, advance)
                self.scheduler.step()
                if epoch % config.val_every_n_epochs == 0 or epoch == config.epochs - 1:
                    self.history.append({"epoch": epoch + 1, "train_loss": loss, "top": self._test(test)})
                self.epoch = epoch + 1
                self._save()
        return self.history

    def _train(self, epoch: int, advance: Callable[[int], None]) -> float:
        """Train for one epoch; returns the mean loss of its batches over all ranks."""
        device, losses = self.task.context.device, []
        for images_BCHW, labels_B in self.loader.epoch(epoch):
            loss = self._loss(images_BCHW.to(device, non_blocking=True), labels_B.to(device, non_blocking=True))
            self.optimizer.zero_grad()
            self.task.context.fabric.backward(loss)
            self.optimizer.step()
            losses.append(loss.detach())
            advance(1)
        return float(all_reduce_mean(torch.stack(losses).mean()))

    def _loss(self, images_BCHW: Tensor, labels_B: Tensor) -> Tensor:
        if not len(labels_B):  # all unreadable; the other ranks still wait for the gradients of this one
            return self.module(torch.zeros(0, self.width, device=labels_B.device)).sum()
        return F.cross_entropy(self.module(self.extract(images_BCHW)), labels_B)

    def _test(self, test: Test) -> list[float]:
        weight_CD, bias_C = (parameter.detach().float() for parameter in self.head.parameters())
        return test(lambda features_BD: F.linear(features_BD, weight_CD, bias_C))

    def _key(self, images: LabeledSplits) -> str:
        """A digest of everything that the weights depend on."""
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
            "precision": str(self.task.context.fabric._precision.precision),
        }
        return content_digest(json.dumps(settings).encode())[:12]

    def _save(self) -> None:
        if self.task.context.is_main:
            write_classifier(
                self.file,
                self.head.linear.weight,
                self.head.linear.bias,
                optimizer=self.sgd.state_dict(),
                scheduler=self.scheduler.state_dict(),
                epoch=self.epoch,
                best_acc=max((entry["top"][0] for entry in self.history), default=0.0),
                history=self.history,
            )

    def _resume(self) -> None:
        """Continue from the file, if it exists; the main process reads it for all ranks."""
        state = read_state(self.file, self.task.context)
        if state is None:
            return
        self.head.load_state_dict({key.removeprefix("module."): value for key, value in state["state_dict"].items()})
        self.sgd.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.epoch, self.history = state["epoch"], state["history"]
        self.task.context.say(f"Resuming after epoch {self.epoch} of {self.config.epochs}: {self.file}")
