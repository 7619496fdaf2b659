"""Repeats a saved non-finite step in float32: where it begins, as a table and a sentence."""

import os
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from dino_lightning.config import TrainConfig
from dino_lightning.config.constraints import check_values
from dino_lightning.config.serialization import from_plain
from dino_lightning.data.batch import LabeledCrops
from dino_lightning.errors import UserError
from dino_lightning.methods.base import Method
from dino_lightning.methods.clock import StepClock
from dino_lightning.training.build import build_method
from dino_lightning.training.debug.activation_ranges import (
    ActivationRanges,
    Range,
    first_nonfinite_tensor,
    record_ranges,
)


@dataclass
class Replayed:
    """The result of a replayed step."""

    loss: float
    forward: ActivationRanges
    backward: ActivationRanges
    weights: str | None
    """The first weight that was not finite before the step."""

    @property
    def reproduced(self) -> bool:
        """Whether the replay has values that are not finite, too."""
        return any((self.weights, self.forward.first, self.backward.first))


def replay(saved: dict[str, Any], *, source: str, device: torch.device, layers: bool = False) -> Replayed:
    """Forward and backward pass of the saved micro-batch from the saved weights, in float32.

    `layers` sets `compute.fused=false`, so that the modules within a block are recorded, too.
    """
    if saved["crops"] is None:
        raise UserError(
            f"{source} has no images: on a GPU they were no longer available when the gradient turned out not to be "
            "finite; train with callbacks.nonfinite.policy=skip or rollback to save them."
        )
    config = from_plain(saved["configuration"], source=source)
    check_values(config)
    config.compute.fused = config.compute.fused and not layers
    method = load_method(config, saved, source=source).to(device)
    crops = [crop.float().to(device) for crop in saved["crops"]]
    batch = crops if saved["labels"] is None else LabeledCrops(crops, saved["labels"].to(device))
    forward, backward = ActivationRanges(), ActivationRanges()
    forward.add("crops", crops)
    restore_random_states(saved, device)
    try:
        with record_ranges(method, forward=forward, backward=backward):
            loss = method.loss(batch)
            forward.add("loss", loss)
            loss.backward()
    except (LookupError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{source} has images that do not fit its configuration ({reason}).") from error
    return Replayed(loss.item(), forward, backward, first_nonfinite_tensor(saved["state"]))


def load_method(config: TrainConfig, saved: dict[str, Any], *, source: str) -> Method:
    """The method with the saved weights, schedules and step."""
    config.compute.compile = False  # compiling takes longer than one step
    if hasattr(config.backbone, "pretrained"):
        config.backbone.pretrained = False  # type: ignore[attr-defined]  # the weights are in the file
    classifier = saved["state"].get("student.head.bias")
    try:
        method = build_method(config, num_classes=0 if classifier is None else len(classifier))
        method.load_state_dict(saved["state"])
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{source} has weights that do not fit its configuration ({reason}).") from error
    method.float()
    method.schedules = {name: lambda step, value=value: value for name, value in saved["schedules"].items()}
    lengths = saved["lengths"]
    method.clock = StepClock(
        step=saved["step"],
        steps_per_epoch=-(-lengths["num_training_batches"] // lengths["accumulate_grad_batches"]),
        total_steps=lengths["total_steps"],
        micro_batch=saved["batch_index"],
        rank=saved["rank"],
    )
    return method.train()


def restore_random_states(saved: dict[str, Any], device: torch.device) -> None:
    """Continue random numbers as before the step's forward pass."""
    os.environ["PL_GLOBAL_SEED"] = str(saved["seed"])  # seeds the masks of patches
    for kind, set_state in (("cpu", torch.set_rng_state), ("cuda", torch.cuda.set_rng_state)):
        state = saved["random"].get(kind)
        if isinstance(state, Tensor) and (kind == "cpu" or device.type == "cuda"):
            set_state(state)


def table(saved: dict[str, Any], replayed: Replayed) -> Table:
    """The ranges of activations in the run and in the replay."""
    ranges = Table(title=f"{saved['what']}, rank {saved['rank']} of {saved['world_size']}")
    ranges.add_column("in the order of the forward pass", overflow="fold")
    for column in (f"the run ({saved['precision']})", "replay (float32)"):
        ranges.add_column(column, justify="right")
        ranges.add_column("not finite", justify="right")
    for name, in_replay in replayed.forward.by_name.items():
        in_run = Range(**saved["ranges"].get(name, {}))
        style = "red" if in_replay.bad or in_run.bad else None
        ranges.add_row(name, *_cells(in_run), *_cells(in_replay), style=style)
    return ranges


def _cells(values: Range) -> tuple[str, str]:
    if not values.count:
        return "", ""
    span = f"{values.low:.3g} … {values.high:.3g}" if values.low <= values.high else "–"
    return span, f"{100 * values.share:.3g} %" if values.bad else ""


def verdict(saved: dict[str, Any], replayed: Replayed) -> str:
    """Where values stop being finite, in a sentence."""
    if replayed.weights is not None:
        return f"The weights were already not finite before this step: {replayed.weights} is the first."
    first = replayed.forward.first
    if first == "crops":
        return "The images themselves have values that are not finite: check the files, crops.mean and crops.std."
    if first == "loss":
        return "It begins in the loss: all activations are finite."
    if first is not None:
        return f"It begins in {first}, the first module whose output is not finite."
    if replayed.backward.first is not None:
        where = f"at the gradient of {replayed.backward.first}"
        return f"The loss is {replayed.loss:.6g}; it begins in the backward pass, {where}."
    others = []
    if saved["world_size"] > 1:
        others.append("the images of another rank (replay its file, if there is one)")
    if saved["lengths"]["accumulate_grad_batches"] > 1:
        others.append("another micro-batch of the step")
    also = f", or {' or '.join(others)}" if others else ""
    in_float32 = saved["precision"].startswith("32")
    cause = "the arithmetic of its device" if in_float32 else f"the precision ({saved['precision']})"
    return f"In the replay all values are finite, and the loss is {replayed.loss:.6g}: the cause is {cause}{also}."
