"""Linear classifiers on frozen features: initialization, accuracy, and the files of a training.

B or M images, D features, C classes, K values of k in top-k.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dino_lightning.errors import UserError
from dino_lightning.evaluation.context import EvalContext, Result
from dino_lightning.evaluation.features.spec import FeatureSpec
from dino_lightning.runtime.files import atomic_file

WEIGHT, BIAS = "module.linear.weight", "module.linear.bias"
"""Keys under `state_dict` in a classifier's file, as in those of the original and in its published classifiers."""


class LinearClassifier(nn.Module):
    """Features (B, D) -> logits (B, C), computed in the precision of the weights, also under autocast."""

    def __init__(self, width: int, classes: int, *, seed: int) -> None:
        super().__init__()
        self.linear = cast(nn.Linear, nn.utils.skip_init(nn.Linear, width, classes))
        nn.init.normal_(self.linear.weight, std=0.01, generator=torch.Generator().manual_seed(seed))
        nn.init.zeros_(self.linear.bias)

    def forward(self, features_BD: Tensor) -> Tensor:
        """Logits."""
        with torch.autocast(features_BD.device.type, enabled=False):
            return self.linear(features_BD.to(self.linear.weight.dtype))


def accuracy_topk(classes: int) -> tuple[int, ...]:
    """Top-1, and with at least five classes also top-5, as in the original."""
    return (1, 5) if classes >= 5 else (1,)


def count_correct(logits_BC: Tensor, labels_B: Tensor, *, topk: Sequence[int]) -> Tensor:
    """The number of images whose class is among the first 1, 5, …: (K,) int64; for logits (L, B, C), (L, K).

    Among equal logits the lower class is first. An image whose logits are NaN counts as wrong.
    """
    C = logits_BC.shape[-1]
    labels_B1 = labels_B[:, None]
    target_B1 = logits_BC.take_along_dim(labels_B1.expand(*logits_BC.shape[:-1], 1), dim=-1)
    higher_BC = torch.arange(C, device=labels_B.device) > labels_B1
    behind_B = ((logits_BC < target_B1) | ((logits_BC == target_B1) & higher_BC)).sum(dim=-1)
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
    """Accuracy in percent for each k of `topk`, on the CPU: (K,), or (L, K) if the logits are (L, B, C)."""
    correct = [
        count_correct(classify(features.to(device)), labels.to(device), topk=topk)
        for features, labels in zip(features_MD.split(chunk), labels_M.split(chunk), strict=True)
    ]
    return 100 * torch.stack(correct).sum(dim=0).cpu().double() / len(labels_M)


def top_results(top: Sequence[float], details: dict[str, Any]) -> Iterator[Result]:
    """`top1` and, if `top` has two accuracies, `top5`."""
    yield Result("top1", top[0], main=True, details=details)
    if len(top) > 1:
        yield Result("top5", top[1], main=True)


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Write a state of tensors and plain types, completely or not at all; only for the main process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        torch.save(state, file)


def read_state(path: Path, context: EvalContext) -> dict[str, Any] | None:
    """The state, on the CPU of every rank but read by the main process; None if there is no file.

    Raises `UserError` if the file cannot be read.
    """
    state = None
    if context.is_main and path.is_file():
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged file can raise anything; all ranks must raise
            state = f"{path} is not a complete checkpoint ({type(error).__name__}); delete it to restart the training."
    state = cast(dict[str, Any] | str | None, context.fabric.broadcast(state))
    if isinstance(state, str):
        raise UserError(state)
    return state


def write_classifier(path: Path, weight_CD: Tensor, bias_C: Tensor, **state: Any) -> None:
    """Write a file of the original's layout, with `state` next to the weights; completely or not at all."""
    weights = {WEIGHT: weight_CD.detach().cpu().clone(), BIAS: bias_C.detach().cpu().clone()}
    write_state(path, {"state_dict": weights, **state})


def read_classifier(path: Path, *, width: int, classes: int, spec: FeatureSpec) -> Callable[[Tensor], Tensor]:
    """Features (B, D) -> logits (B, C) of a trained classifier: the original's, a published one, or ours.

    Raises `UserError` if the file is not a classifier, or has other shapes.
    """
    weight_CD, bias_C = _read_weights(path)
    if bias_C.shape != weight_CD.shape[:1]:
        raise UserError(
            f"eval.classifier={path}: its weight has shape {tuple(weight_CD.shape)}, which does not match its bias of "
            f"shape {tuple(bias_C.shape)}."
        )
    if weight_CD.shape[0] != classes:
        raise UserError(f"eval.classifier={path} has {weight_CD.shape[0]} classes, but the data has {classes}.")
    if weight_CD.shape[1] != width:
        raise UserError(
            f"eval.classifier={path} takes {weight_CD.shape[1]} features, but the network gives {width} with {spec}; "
            "set eval.n_last_blocks and eval.avgpool as in its training."
        )
    return lambda features_BD: F.linear(features_BD, weight_CD.to(features_BD), bias_C.to(features_BD))


def _read_weights(path: Path) -> tuple[Tensor, Tensor]:
    if not path.is_file():
        raise UserError(f"eval.classifier={path} does not exist; expected the file of a trained classifier, or null.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise anything
        raise UserError(
            f"eval.classifier={path} cannot be read ({type(error).__name__}); expected a file that torch.load reads "
            "with weights_only=True."
        ) from error
    weights = content.get("state_dict", content) if isinstance(content, dict) else {}
    weights = {str(key).removeprefix("module."): value for key, value in weights.items()}
    weight, bias = (weights.get(key.removeprefix("module.")) for key in (WEIGHT, BIAS))
    if not isinstance(weight, Tensor) or not isinstance(bias, Tensor) or weight.ndim != 2:
        raise UserError(f"eval.classifier={path} contains no classifier; expected the keys '{WEIGHT}' and '{BIAS}'.")
    return weight.float(), bias.float()
