"""Linear classifiers for many learning rates on several kinds of features, trained at once on extracted tokens.

The classifiers of one kind of features are one matrix: a step of all of them is two matrix products. L learning rates,
C classes, D features, B images of a batch, N training images, T token values of an image.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dino_lightning.evaluation.classification.classifiers import LinearClassifier
from dino_lightning.evaluation.features.choice import FeatureChoice
from dino_lightning.models.tokens import join_tokens

MOMENTUM = 0.9
SHARE_OF_MEMORY = 0.5
"""Of an accelerator's free memory; larger features stay in the host's and are sent batch by batch."""


@dataclass(frozen=True)
class Tokens:
    """How an image's T values are laid out: those of `networks.linear_features` for the widest choice."""

    width: int
    """Of a token."""
    n: int
    """Class tokens of this many last blocks."""
    mean_patch: bool
    """Whether the mean patch token follows them; with n = 1 the two alternate."""

    def of(self, choice: FeatureChoice, tokens_BT: Tensor) -> Tensor:
        """The features (B, D) of a choice."""
        if self.n == 1 and self.mean_patch:
            parts = list(tokens_BT.unflatten(1, (self.width, 2)).unbind(2))
        else:
            parts = list(tokens_BT.split(self.width, dim=1))
        return join_tokens(parts[self.n - choice.n_last_blocks : self.n], parts[-1] if choice.avgpool else None)


class Heads:
    """Classifiers of one kind of features, one for each learning rate, all from the same start.

    Cross-entropy by SGD with momentum 0.9 and no weight decay; step by step what `torch.optim.SGD` does to each alone.
    Takes 12 L C D bytes on `device`, and 8 L B C within a step.
    """

    def __init__(self, width: int, classes: int, *, lrs: Sequence[float], seed: int, device: torch.device) -> None:
        start = LinearClassifier(width, classes, seed=seed).linear
        self.lr_L = torch.tensor(lrs, dtype=torch.float32, device=device)
        self.weight_LCD = start.weight.detach().to(device).repeat(len(lrs), 1, 1)
        self.bias_LC = start.bias.detach().to(device).repeat(len(lrs), 1)
        self.velocities = torch.zeros_like(self.weight_LCD), torch.zeros_like(self.bias_LC)

    def logits(self, features_BD: Tensor) -> Tensor:
        """Of all classifiers: (L, B, C)."""
        both_BLC = F.linear(features_BD, self.weight_LCD.flatten(0, 1), self.bias_LC.flatten())
        return both_BLC.unflatten(1, self.bias_LC.shape).transpose(0, 1)

    @torch.no_grad()
    def step(self, features_BD: Tensor, labels_B: Tensor, *, factor: float) -> None:
        """One step of each at its learning rate times `factor`."""
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
    heads: dict[FeatureChoice, Heads],
    tokens_NT: Tensor,
    labels_N: Tensor,
    *,
    rows: Tensor,
    layout: Tokens,
    epochs: int,
    batch_size: int,
    seed: int,
    device: torch.device,
    advance: Callable[[int], None],
) -> None:
    """Train all of `heads` on the same batches of the images `rows`; `advance` hears of every epoch.

    A learning rate is per 256 images of a batch and follows a cosine, step by step, towards 0. An incomplete last
    batch stays.
    """
    if not heads:
        return
    tokens_NT = _placed(tokens_NT, device)
    labels_N = labels_N.to(tokens_NT.device)
    scale = min(batch_size, len(rows)) / 256
    steps, step = epochs * -(-len(rows) // batch_size), 0
    for epoch in range(epochs):
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed + epoch))
        for batch in rows[order].to(tokens_NT.device).split(batch_size):
            tokens_BT, labels_B = tokens_NT[batch].to(device), labels_N[batch].to(device)
            factor = scale * 0.5 * (1 + math.cos(math.pi * step / steps))
            for choice, each in heads.items():
                each.step(layout.of(choice, tokens_BT), labels_B, factor=factor)
            step += 1
        advance(1)


def _placed(tokens_NT: Tensor, device: torch.device) -> Tensor:
    """On the device where they fit beside all else, else where they are."""
    if device.type != "cuda":
        return tokens_NT
    free, _ = torch.cuda.mem_get_info(device)
    return tokens_NT.to(device) if tokens_NT.nbytes <= SHARE_OF_MEMORY * free else tokens_NT
