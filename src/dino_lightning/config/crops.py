"""The augmentation: `crops`."""

from dataclasses import dataclass, field


@dataclass
class CropsConfig:
    """The multi-crop augmentation: two global views and `local_count` local ones."""

    backend: str = "pil"
    """What makes the crops. `pil`: the original's operators, bit for bit. `cpu`: the same, compiled, in float32.
    `device`: loader processes decode and cut, the rest happens on the accelerator."""
    global_size: int = 224
    """Side of a global crop (pixels)."""
    global_scale: list[float] = field(default_factory=lambda: [0.4, 1.0])
    """Smallest and largest area of a global crop (share of the image)."""
    local_size: int = 96
    """Side of a local crop (pixels)."""
    local_scale: list[float] = field(default_factory=lambda: [0.05, 0.4])
    """Smallest and largest area of a local crop (share of the image)."""
    local_count: int = 8
    """Local crops per image; 0 turns multi-crop off (then widen `global_scale` to [0.14, 1])."""
    ratio: list[float] = field(default_factory=lambda: [3 / 4, 4 / 3])
    """Smallest and largest aspect ratio of a crop (width / height)."""
    flip_p: float = 0.5
    """Probability of a horizontal flip."""
    jitter_p: float = 0.8
    """Probability of the color jitter."""
    brightness: float = 0.4
    """Largest relative change of brightness."""
    contrast: float = 0.4
    """Largest relative change of contrast."""
    saturation: float = 0.2
    """Largest relative change of saturation."""
    hue: float = 0.1
    """Largest rotation of the hue (turns)."""
    grayscale_p: float = 0.2
    """Probability of dropping the color."""
    blur_p: list[float] = field(default_factory=lambda: [1.0, 0.1, 0.5])
    """Probability of Gaussian blur for the first global, the second global and each local crop."""
    blur_radius: list[float] = field(default_factory=lambda: [0.1, 2.0])
    """Smallest and largest standard deviation of the blur (pixels)."""
    solarize_p: list[float] = field(default_factory=lambda: [0.0, 0.2, 0.0])
    """Probability of solarisation for the first global, the second global and each local crop."""
    solarize_threshold: int = 128
    """Values at or above it are inverted (0 to 255)."""
    mean: list[float] = field(default_factory=lambda: [0.485, 0.456, 0.406])
    """Mean of each channel, subtracted from the crops (of values in 0 to 1)."""
    std: list[float] = field(default_factory=lambda: [0.229, 0.224, 0.225])
    """Standard deviation of each channel, by which the crops are divided (of values in 0 to 1)."""
    eval_resize: int = 256
    """Shorter side to which an image is resized for evaluation (pixels)."""
    eval_size: int = 224
    """Side of the center crop for evaluation (pixels)."""
