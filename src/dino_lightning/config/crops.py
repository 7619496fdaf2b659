"""The augmentation: `crops`."""

from dataclasses import dataclass, field
from typing import Annotated

from dino_lightning.config.ranges import AtLeast, OneOf, Pair, Range, Share, each

Strength = Range("a number from 0 to 1000", lambda value: 0 <= value <= 1000)
PerView = Range(
    "three probabilities: first global, second global, local crops",
    lambda value: len(value) == 3 and all(0 <= p <= 1 for p in value),
)
Means = Range("a number for each channel, at most a million", lambda value: all(abs(mean) <= 1e6 for mean in value))
Deviations = Range("a number for each channel, from a millionth to a million", each(lambda std: 1e-6 <= std <= 1e6))


@dataclass
class CropsConfig:
    """The multi-crop augmentation: two global views and `local_count` local ones."""

    backend: Annotated[str, OneOf("pil", "cpu", "device")] = "pil"
    """Implementation of the augmentation. `pil` has the original's operators, bit for bit; `cpu` has the same
    operators, compiled, in float32; with `device`, loader processes decode and cut, and the accelerator does the
    rest."""
    global_size: Annotated[int, AtLeast(1)] = 224
    """Side of a global crop (pixels)."""
    global_scale: Annotated[list[float], Pair(1, of="shares of the image")] = field(default_factory=lambda: [0.4, 1.0])
    """Smallest and largest area of a global crop (share of the image)."""
    local_size: Annotated[int, AtLeast(1)] = 96
    """Side of a local crop (pixels)."""
    local_scale: Annotated[list[float], Pair(1, of="shares of the image")] = field(default_factory=lambda: [0.05, 0.4])
    """Smallest and largest area of a local crop (share of the image)."""
    local_count: Annotated[int, AtLeast(0)] = 8
    """Local crops per image; 0 turns multi-crop off (then widen `global_scale` to [0.14, 1])."""
    ratio: Annotated[list[float], Pair(1000)] = field(default_factory=lambda: [3 / 4, 4 / 3])
    """Smallest and largest aspect ratio of a crop (width / height)."""
    flip_p: Annotated[float, Share] = 0.5
    """Probability of a horizontal flip."""
    jitter_p: Annotated[float, Share] = 0.8
    """Probability of the color jitter."""
    brightness: Annotated[float, Strength] = 0.4
    """Largest relative change of brightness."""
    contrast: Annotated[float, Strength] = 0.4
    """Largest relative change of contrast."""
    saturation: Annotated[float, Strength] = 0.2
    """Largest relative change of saturation."""
    hue: Annotated[float, Range("a number from 0 to 0.5", lambda value: 0 <= value <= 0.5)] = 0.1
    """Largest change of the hue (full turns)."""
    grayscale_p: Annotated[float, Share] = 0.2
    """Probability of conversion to gray."""
    blur_p: Annotated[list[float], PerView] = field(default_factory=lambda: [1.0, 0.1, 0.5])
    """Probability of Gaussian blur for the first global, the second global and each local crop."""
    blur_radius: Annotated[list[float], Pair(1000)] = field(default_factory=lambda: [0.1, 2.0])
    """Smallest and largest standard deviation of the blur (pixels)."""
    solarize_p: Annotated[list[float], PerView] = field(default_factory=lambda: [0.0, 0.2, 0.0])
    """Probability of solarization for the first global, the second global and each local crop."""
    solarize_threshold: Annotated[int, Range("an integer from 0 to 256", lambda value: 0 <= value <= 256)] = 128
    """Value from which solarization inverts pixels (of values from 0 to 255)."""
    mean: Annotated[list[float], Means] = field(default_factory=lambda: [0.485, 0.456, 0.406])
    """Mean of each channel, which is subtracted from the crops (values are in 0 to 1)."""
    std: Annotated[list[float], Deviations] = field(default_factory=lambda: [0.229, 0.224, 0.225])
    """Standard deviation of each channel, by which the crops are divided (values are in 0 to 1)."""
    eval_resize: Annotated[int, AtLeast(2)] = 256
    """Shorter side to which an image is resized for evaluation (pixels)."""
    eval_size: Annotated[int, AtLeast(1)] = 224
    """Side of the center crop for evaluation (pixels)."""
