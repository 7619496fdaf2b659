"""The parameters of a batch of crops as tensors: created in loader processes, used on the device."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from dino_lightning.data.crops.blur import padded_weights
from dino_lightning.data.crops.sampling import BRIGHTNESS, CONTRAST, HUE, SATURATION, Crop

BLENDS = 3
"""Brightness, contrast and saturation: each blends the image with another one."""


@dataclass
class Packed:
    """Named one-dimensional tensors in a single tensor, so that a batch is copied in a few large pieces."""

    tensor: Tensor
    bounds: dict[str, tuple[int, int]]

    @classmethod
    def pack(cls, parts: dict[str, list[int]] | dict[str, list[float]], *, dtype: torch.dtype) -> Self:
        """Pack lists of numbers by name."""
        bounds, flat = {}, []
        for name, values in parts.items():
            bounds[name] = (len(flat), len(flat) + len(values))
            flat += values
        return cls(torch.tensor(flat, dtype=dtype), bounds)

    def __getitem__(self, name: str) -> Tensor:
        start, end = self.bounds[name]
        return self.tensor[start:end]

    def changed(self, change: Callable[[Tensor], Tensor]) -> "Packed":
        """The tensors on another device, or in page-locked memory."""
        return Packed(change(self.tensor), self.bounds)


@dataclass
class DevicePlan:
    """The augmentation of N crops with one size.

    The crops are sorted: first those without color jitter, then those whose hue changes before the three blends of the
    jitter, after one, two and three of them. So the hue changes in four slices, with the blends between them.

    `indices` contains sorted positions:
        inverse                position in the batch -> sorted position (N,)
        flip, gray, solarize   crops that are flipped, converted to gray, solarized
        saturation_k           crops whose blend k is the saturation
        blur                   crops that are blurred
    `numbers` contains, for the J crops with jitter,
        keep, mean    blend k multiplies by `keep` (3 J,) and adds `mean` times the mean luminance; `mean` is 0 unless
                      the blend is the contrast
        hue           turns (J,); empty if no hue changes
        saturation_k  the share of the image that is kept
        blur          weights of the boxes (blurred crops × longest,), padded with zeros
    """

    order: list[int]
    """Sorted position -> position in the batch (N,)."""
    hue_bounds: list[int]
    """The hue of the crops from `hue_bounds[k]` to `hue_bounds[k + 1]` changes after k blends (5,)."""
    indices: Packed
    numbers: Packed

    def changed(self, change: Callable[[Tensor], Tensor]) -> "DevicePlan":
        """The plan on another device, or in page-locked memory."""
        return replace(self, indices=self.indices.changed(change), numbers=self.numbers.changed(change))


def make_device_plan(crops: Sequence[Crop]) -> DevicePlan:
    """The plan of N crops with one size."""
    stages = [_hue_stage(crop) for crop in crops]
    order = sorted(range(len(crops)), key=stages.__getitem__)
    ordered = [crops[i] for i in order]
    bounds = [sum(stage < k for stage in stages) for k in range(BLENDS + 2)]
    jitter_indices, jitter_numbers = _jitter(ordered[bounds[0] :], first=bounds[0])
    changed = {
        name: [i for i, crop in enumerate(ordered) if getattr(crop, name)]
        for name in ("flip", "gray", "solarize", "blur")
    }
    weights = padded_weights([ordered[i].blur for i in changed["blur"]])
    indices = {"inverse": sorted(range(len(order)), key=order.__getitem__), **changed, **jitter_indices}
    numbers = {"blur": [weight for row in weights for weight in row], **jitter_numbers}
    packed = Packed.pack(indices, dtype=torch.int64), Packed.pack(numbers, dtype=torch.float32)
    return DevicePlan(order, bounds, *packed)


def _jitter(crops: list[Crop], *, first: int) -> tuple[dict[str, list[int]], dict[str, list[float]]]:
    """Indices and numbers of the crops with jitter, whose sorted positions start at `first`."""
    saturated: list[list[int]] = [[] for _ in range(BLENDS)]
    shares: list[list[float]] = [[] for _ in range(BLENDS)]
    keep, mean = [1.0] * (BLENDS * len(crops)), [0.0] * (BLENDS * len(crops))
    turns = [0.0] * len(crops)
    for position, crop in enumerate(crops):
        k = 0
        for operation, factor in crop.jitter:
            if operation == HUE:
                turns[position] = factor
                continue
            if operation == SATURATION:
                saturated[k].append(first + position)
                shares[k].append(factor)
            else:
                assert operation in (BRIGHTNESS, CONTRAST)
                keep[k * len(crops) + position] = factor
                mean[k * len(crops) + position] = 1 - factor if operation == CONTRAST else 0.0
            k += 1
    names = [f"saturation_{k}" for k in range(BLENDS)]
    numbers = {"keep": keep, "mean": mean, "hue": turns if any(turns) else [], **dict(zip(names, shares, strict=True))}
    return dict(zip(names, saturated, strict=True)), numbers


def _hue_stage(crop: Crop) -> int:
    """-1 without jitter, otherwise the number of blends before the hue; 0 without a hue."""
    operations = [operation for operation, _ in crop.jitter]
    return operations.index(HUE) if HUE in operations else min(len(operations), 1) - 1
