"""What linear classifiers on frozen features share: which features, how many are right, and the file.

B or M images, D features, C classes, K numbers of guesses.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dino_lightning.errors import UserError
from dino_lightning.evaluation.features.choice import FeatureChoice

WEIGHT, BIAS = "module.linear.weight", "module.linear.bias"
"""Keys of a classifier's file below `state_dict`: those of the original and of its published classifiers."""


class LinearClassifier(nn.Module):
    """Features (B, D) -> logits (B, C). Computes in the precision of its weights, also under autocast."""

    def __init__(self, width: int, classes: int, *, seed: int) -> None:
        super().__init__()
        self.linear = cast(nn.Linear, nn.utils.skip_init(nn.Linear, width, classes))
        nn.init.normal_(self.linear.weight, std=0.01, generator=torch.Generator().manual_seed(seed))
        nn.init.zeros_(self.linear.bias)

    def forward(self, features_BD: Tensor) -> Tensor:
        """Logits."""
        with torch.autocast(features_BD.device.type, enabled=False):
            return self.linear(features_BD.to(self.linear.weight.dtype))


def guesses(classes: int) -> tuple[int, ...]:
    """Top-1, and top-5 where there are five classes, as in the original."""
    return (1, 5) if classes >= 5 else (1,)


def count_right(logits_BC: Tensor, labels_B: Tensor, *, topk: Sequence[int]) -> Tensor:
    """How many of B images have their class among the first 1, 5, …: (K,) int64; for logits (L, B, C), (L, K).

    Of equal logits the lower class comes first. Logits that are no numbers are wrong.
    """
    C = logits_BC.shape[-1]
    labels_B1 = labels_B[:, None]
    target_B1 = logits_BC.take_along_dim(labels_B1.expand(*logits_BC.shape[:-1], 1), dim=-1)
    later_BC = torch.arange(C, device=labels_B.device) > labels_B1
    behind_B = ((logits_BC < target_B1) | ((logits_BC == target_B1) & later_BC)).sum(dim=-1)
    ranks_B = C - 1 - behind_B
    return torch.stack([(ranks_B < k).sum(dim=-1) for k in topk], dim=-1)


@torch.no_grad()
def accuracy(
    classify: Callable[[Tensor], Tensor],
    features_MD: Tensor,
    labels_M: Tensor,
    *,
    topk: Sequence[int],
    device: torch.device,
    chunk: int = 4096,
) -> Tensor:
    """Per cent of M images for each of `topk`, on the CPU: (K,), or (L, K) where logits are (L, B, C)."""
    right = torch.stack(
        [
            count_right(classify(features.to(device)), labels.to(device), topk=topk)
            for features, labels in zip(features_MD.split(chunk), labels_M.split(chunk), strict=True)
        ]
    )
    return 100 * right.sum(dim=0).cpu().double() / len(labels_M)


def write_classifier(path: Path, weight_CD: Tensor, bias_C: Tensor, **state: Any) -> None:
    """A file of the original's layout, with `state` beside the weights; whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    weights = {WEIGHT: weight_CD.detach().cpu().clone(), BIAS: bias_C.detach().cpu().clone()}
    torch.save({"state_dict": weights, **state}, temporary)
    os.replace(temporary, path)


def read_classifier(path: Path, *, width: int, classes: int, choice: FeatureChoice) -> Callable[[Tensor], Tensor]:
    """Features (B, D) -> logits (B, C) of a trained classifier: of the original's, a published one, or our own.

    Raises `UserError` where the file is none, or of other shapes.
    """
    weight_CD, bias_C = _weights(path)
    if bias_C.shape != weight_CD.shape[:1]:
        raise UserError(
            f"eval.classifier={path}: its weight is {tuple(weight_CD.shape)} and its bias "
            f"{tuple(bias_C.shape)}; they do not belong together."
        )
    found_classes, found_width = weight_CD.shape
    if found_classes != classes:
        raise UserError(f"eval.classifier={path} tells {found_classes} classes apart, and the data has {classes}.")
    if found_width != width:
        raise UserError(
            f"eval.classifier={path} takes {found_width} features, and the network gives {width} with "
            f"{choice}; set eval.n_last_blocks and eval.avgpool as it was trained."
        )
    return lambda features_BD: F.linear(features_BD, weight_CD.to(features_BD), bias_C.to(features_BD))


def _weights(path: Path) -> tuple[Tensor, Tensor]:
    if not path.is_file():
        raise UserError(f"eval.classifier={path} is not there; give the file of a trained classifier, or null.")
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(
            f"eval.classifier={path} cannot be read ({type(error).__name__}); expected a file that "
            "torch.load reads with weights_only=True."
        ) from error
    weights = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else {}
    weights = {str(key).removeprefix("module."): value for key, value in weights.items()}
    found = [weights.get(key.removeprefix("module.")) for key in (WEIGHT, BIAS)]
    weight, bias = found
    if not isinstance(weight, Tensor) or not isinstance(bias, Tensor) or weight.ndim != 2:
        raise UserError(f"eval.classifier={path} holds no classifier; expected '{WEIGHT}' and '{BIAS}' in it.")
    return weight.float(), bias.float()
