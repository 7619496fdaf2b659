"""The parts of DeiT's recipe, built from timm: classifier, augmentation, mixing, loss, optimizer, schedule.

B images of C channels, K classes.
"""

import math
from collections.abc import Iterator
from typing import Any

import timm
import torch
from PIL import Image
from timm.data import Mixup, create_transform
from timm.data.auto_augment import AugmentOp, posterize
from timm.data.mixup import mixup_target
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from dino_lightning.config import FinetuneEval
from dino_lightning.data.batches import crop_seed
from dino_lightning.errors import UserError, did_you_mean
from dino_lightning.evaluation.classification.training_images import seeded_rngs
from dino_lightning.models.frozen import FrozenNetwork
from dino_lightning.optim.schedules import Cosine
from dino_lightning.runtime.collectives import rank

LR_IMAGES = 512
"""Images per step for which `eval.lr` is defined; the learning rate is proportional to the images per step."""
STD_FRESH, STD_TRAINED = 0.02, 2e-5
"""Standard deviations of the classifier's initial weights: DeiT's, and on a trained network that of BEiT and MAE. The
paper's authors also used far less than DeiT's there (facebookresearch/dino issue 31)."""
POLICIES = ("rand-m9-mstd0.5-inc1", "original-mstd0.5", "v0-mstd0.5", "3a", "augmix-m5-w4-d2")


def add_classifier(network: FrozenNetwork, *, drop_path_rate: float, classes: int, seed: int) -> tuple[nn.Module, str]:
    """A trainable copy of the network with a classifier on its features, and the name of the classifier.

    It is timm's network for `classes` classes, and its state dict has timm's names. An untrained network keeps its
    fresh weights, which depend on its own seed. Raises `UserError` if the architecture does not support stochastic
    depth.
    """
    with seeded_rngs(crop_seed(seed)):
        model: Any = network.rebuild(drop_path_rate=drop_path_rate)
        model.load_state_dict(network.backbone.state_dict())
        model.reset_classifier(classes)
        layers = model.get_classifier()
        layers = layers if isinstance(layers, tuple) else (layers,)  # two with a distillation token
        names = [name for name, module in model.named_modules() if module in layers and isinstance(module, nn.Linear)]
        for name in names:
            layer = model.get_submodule(name)
            nn.init.trunc_normal_(layer.weight, std=STD_TRAINED if network.trained else STD_FRESH)
            nn.init.zeros_(layer.bias)
    if not names:
        raise UserError(
            f"checkpoint: {network.name} ({type(model).__name__}) cannot have a linear classifier, which finetuning "
            "needs."
        )
    return model.requires_grad_(True), names[0]


class FinetuneAugmentation:
    """Image -> a random crop (bicubic), flip, the policy, normalization and random erasing: (C, size, size)."""

    def __init__(self, config: FinetuneEval, network: FrozenNetwork, *, size: int) -> None:
        policy, channels = config.auto_augment, network.channels
        if policy and channels not in (1, 3):
            raise UserError(
                f"eval.auto_augment={policy}: timm's policies do not support images with {channels} channels; set "
                "eval.auto_augment=null."
            )
        try:
            self.transform = _build_transform(config, network, size)
            if policy:
                # Some invalid names raise only when an operator is drawn.
                example = Image.new("L" if channels == 1 else "RGB", (size, size))
                with seeded_rngs(0):
                    for _ in range(20):
                        self.transform(example)
        except Exception as error:
            reason = str(error) or type(error).__name__
            raise UserError(
                f"eval.auto_augment={policy}: timm {timm.__version__} rejects this policy ({reason}); "
                f"{did_you_mean(str(policy), POLICIES)}"
            ) from error

    def __call__(self, image: Image.Image | Tensor) -> Tensor:
        """Draws from `random`, `numpy.random` and PyTorch."""
        return self.transform(image / 255 if isinstance(image, Tensor) else image)


def _build_transform(config: FinetuneEval, network: FrozenNetwork, size: int) -> Any:
    policy = config.auto_augment or None
    transform: Any = create_transform(
        (network.channels, size, size),
        is_training=True,
        auto_augment=policy,
        # timm uses it only with policies that need it, such as 3a.
        color_jitter=0.3 if policy else None,  # type: ignore[arg-type]
        interpolation="bicubic",
        mean=tuple(network.mean),
        std=tuple(network.std),
        re_prob=config.random_erasing,
        re_mode="pixel",
        re_count=1,
    )
    for operator in _operators(transform.transforms):
        if operator.aug_fn is posterize:
            operator.aug_fn = posterize_or_black
    return transform


def posterize_or_black(image: Image.Image, bits: int, **options: Any) -> Image.Image:
    """Keep `bits` of each value; with 0 bits the image is black.

    DeiT's policy does that to one of 600 images. timm expects black, as old versions of Pillow gave; new ones raise.
    """
    return posterize(image, bits, **options) if bits >= 1 else Image.new(image.mode, image.size)


def _operators(parts: Any) -> Iterator[AugmentOp]:
    """The operators in timm's policies, which are nested lists."""
    for part in parts:
        if isinstance(part, AugmentOp):
            yield part
        elif isinstance(part, list):
            yield from _operators(part)
        else:
            yield from _operators([*getattr(part, "ops", ()), *getattr(part, "policy", ())])


class Targets:
    """Mixup or CutMix of a batch, label smoothing, and the loss of logits (B, K)."""

    def __init__(self, config: FinetuneEval, *, classes: int, seed: int) -> None:
        self.seed, self.classes, self.smoothing = seed, classes, config.label_smoothing
        self.mixup: Mixup | None = None
        self.loss: nn.Module = LabelSmoothingCrossEntropy(config.label_smoothing)
        if config.mixup or config.cutmix:
            self.mixup = Mixup(config.mixup, config.cutmix, label_smoothing=config.label_smoothing, num_classes=classes)
            self.loss = SoftTargetCrossEntropy()

    def __call__(self, images_BCHW: Tensor, labels_B: Tensor, *, step: int) -> tuple[Tensor, Tensor]:
        """The images, mixed in place, and targets: (B, K) for mixed images, else the labels (B,).

        Random draws depend only on the seed, the step and the rank. Of an odd number of images the last one is not
        mixed, because timm mixes pairs.
        """
        if self.mixup is None:
            return images_BCHW, labels_B
        even = len(labels_B) // 2 * 2
        targets_BK = mixup_target(labels_B, self.classes, smoothing=self.smoothing)
        if even:
            with seeded_rngs(crop_seed(self.seed, step, rank())):
                images_BCHW[:even], targets_BK[:even] = self.mixup(images_BCHW[:even], labels_B[:even])
        return images_BCHW, targets_BK


def build_optimizer(model: nn.Module, config: FinetuneEval) -> torch.optim.Optimizer:
    """AdamW with the factor of its layer as `lr_scale` of each group; vectors and position embeddings do not decay."""
    layer_decay = None if config.layer_decay == 1 else config.layer_decay
    try:
        return create_optimizer_v2(
            model, "adamw", lr=config.lr, weight_decay=config.weight_decay, layer_decay=layer_decay
        )
    except Exception as error:
        if layer_decay is None:
            raise
        raise UserError(
            f"eval.layer_decay={layer_decay}: timm does not define the layers of {type(model).__name__}; set "
            "eval.layer_decay=1."
        ) from error


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of the top layer to `rate`, and that of other layers in proportion to their `lr_scale`."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)


def learning_rate_schedule(config: FinetuneEval, *, steps_per_epoch: int, world_size: int) -> Cosine:
    """The learning rate of each step: warm-up and cosine."""
    return Cosine(
        config.lr * config.batch_size_per_device * world_size / LR_IMAGES,
        config.lr_end,
        total_steps=config.epochs * steps_per_epoch,
        warmup_steps=config.warmup_epochs * steps_per_epoch,
    )


def check_full_batch(images: int, *, batch_size: int, ranks: int) -> None:
    """Raise `UserError` if there is no full batch; incomplete ones are dropped, as in DeiT."""
    images_per_rank = math.ceil(images / ranks)
    if images_per_rank < batch_size:
        each = f" for each of {ranks} processes" if ranks > 1 else ""
        raise UserError(
            f"eval.batch_size_per_device={batch_size}: {images} labeled training images are fewer than one "
            f"batch{each}; set it to at most {images_per_rank}."
        )
