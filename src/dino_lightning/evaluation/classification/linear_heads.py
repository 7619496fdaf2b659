"""Linear classifiers for many learning rates and several kinds of features, trained together on extracted tokens.

The classifiers of one kind of features are one matrix: an optimizer step of all of them is two matrix products.
L learning rates, C classes, D features, B images of a batch, N training images, T token values of an image.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dino_lightning.evaluation.classification.classifiers import LinearClassifier
from dino_lightning.evaluation.features.spec import FeatureSpec
from dino_lightning.models.tokens import join_tokens

MOMENTUM = 0.9
MEMORY_SHARE = 0.5
"""Share of an accelerator's free memory; larger features stay in host memory and are copied batch by batch."""


@dataclass(frozen=True)
class TokenLayout:
    """The layout of an image's T values: that of `linear_features` for the widest spec."""

    width: int
    """Width of a token."""
    n: int
    """Number of last blocks whose class tokens are included."""
    mean_patch: bool
    """Whether the mean patch token follows them; with n = 1 the values of the two alternate."""

    def select(self, spec: FeatureSpec, tokens_BT: Tensor) -> Tensor:
        """The features (B, D) of a spec."""
        if self.n == 1 and self.mean_patch:
            parts = list(tokens_BT.unflatten(1, (self.width, 2)).unbind(2))
        else:
            parts = list(tokens_BT.split(self.width, dim=1))
        return join_tokens(parts[self.n - spec.n_last_blocks : self.n], parts[-1] if spec.avgpool else None)


class LinearHeads:
    """Classifiers of one kind of features, one per learning rate, all with the same initialization.

    Cross-entropy and SGD with momentum 0.9 and no weight decay; each step equals that of `torch.optim.SGD` for each
    classifier. Needs 12 L C D bytes on `device`, and 8 L B C during a step.
    """

    def __init__(self, width: int, classes: int, *, lrs: Sequence[float], seed: int, device: torch.device) -> None:
        initial = LinearClassifier(width, classes, seed=seed).linear
        self.lr_L = torch.tensor(lrs, dtype=torch.float32, device=device)
        self.weight_LCD = initial.weight.detach().to(device).repeat(len(lrs), 1, 1)
        self.bias_LC = initial.bias.detach().to(device).repeat(len(lrs), 1)
        self.velocities = torch.zeros_like(self.weight_LCD), torch.zeros_like(self.bias_LC)

    def logits(self, features_BD: Tensor) -> Tensor:
        """The logits of all classifiers: (L, B, C)."""
        logits_BLC = F.linear(features_BD, self.weight_LCD.flatten(0, 1), self.bias_LC.flatten())
        return logits_BLC.unflatten(1, self.bias_LC.shape).transpose(0, 1)

    @torch.no_grad()
    def step(self, features_BD: Tensor, labels_B: Tensor, *, factor: float) -> None:
        """One step of each classifier, at its learning rate times `factor`."""
        errors_BLC = self.logits(features_BD).transpose(0, 1).softmax(dim=-1)
        errors_BLC -= F.one_hot(labels_B, errors_BLC.shape[-1])[:, None]
        errors_BLC /= len(labels_B)
        gradient_LCD = (errors_BLC.flatten(1).T @ features_BD).view_as(self.weight_LCD)
        for weights, velocity, gradient in zip(
            (self.weight_LCD, self.bias_LC), self.velocities, (gradient_LCD, errors_BLC.sum(dim=0)), strict=True
        ):
            velocity.mul_(MOMENTUM).add_(gradient)
            weights.addcmul_(velocity, self.lr_L.view(-1, *[1] * (weights.ndim - 1)), value=-factor)


def train(
    heads: dict[FeatureSpec, LinearHeads],
    tokens_NT: Tensor,
    labels_N: Tensor,
    *,
    indices: Tensor,
    layout: TokenLayout,
    epochs: int,
    batch_size: int,
    seed: int,
    device: torch.device,
    advance: Callable[[int], None],
) -> None:
    """Train all `heads` on the same batches of the images at `indices`; `advance` is called after each epoch.

    A learning rate is per 256 images of a batch and follows a cosine to 0, step by step. An incomplete last batch is
    used.
    """
    if not heads:
        return
    tokens_NT = _on_device(tokens_NT, device)
    labels_N = labels_N.to(tokens_NT.device)
    scale = min(batch_size, len(indices)) / 256
    steps, step = epochs * -(-len(indices) // batch_size), 0
    for epoch in range(epochs):
        order = torch.randperm(len(indices), generator=torch.Generator().manual_seed(seed + epoch))
        for batch in indices[order].to(tokens_NT.device).split(batch_size):
            tokens_BT, labels_B = tokens_NT[batch].to(device), labels_N[batch].to(device)
            factor = scale * 0.5 * (1 + math.cos(math.pi * step / steps))
            for spec, each in heads.items():
                each.step(layout.select(spec, tokens_BT), labels_B, factor=factor)
            step += 1
        advance(1)


def _on_device(tokens_NT: Tensor, device: torch.device) -> Tensor:
    """The tokens on a GPU if they fit into its free memory, otherwise unchanged."""
    if device.type != "cuda":
        return tokens_NT
    free, _ = torch.cuda.mem_get_info(device)
    return tokens_NT.to(device) if tokens_NT.nbytes <= MEMORY_SHARE * free else tokens_NT
