"""The images and their augmentation: `data`, `crops`."""

from dataclasses import dataclass, field

from omegaconf import MISSING


@dataclass
class CropsConfig:
    """The multi-crop augmentation: two global views and `local_count` local ones."""

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
    """Probability of the colour jitter."""
    brightness: float = 0.4
    """Largest relative change of brightness."""
    contrast: float = 0.4
    """Largest relative change of contrast."""
    saturation: float = 0.2
    """Largest relative change of saturation."""
    hue: float = 0.1
    """Largest rotation of the hue (turns)."""
    grayscale_p: float = 0.2
    """Probability of dropping the colour."""
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
    """Side of the centre crop for evaluation (pixels)."""


@dataclass
class DataConfig:
    """The images; one of the children below."""

    batch_size_per_device: int = 64
    """Images per device and micro-batch. Images per optimizer step: this x devices x nodes x accumulation."""
    num_workers: int = 10
    """Loader processes per device; 0 loads in the training process."""
    pin_memory: bool = True
    """Copy batches to page-locked memory (only where there is an accelerator)."""
    holdout: float = 0.1
    """Share of the images kept from training as k-NN queries, where the data has no validation split (0 to 1)."""


@dataclass
class BuiltinData(DataConfig):
    """Procedurally drawn, labelled pictures with object masks: nothing to download."""

    train_images: int = 6000
    """Number of training images."""
    val_images: int = 1200
    """Number of validation images."""
    image_size: int = 32
    """Side of an image (pixels)."""
    draw_seed: int = 0
    """Seed of the drawings (not of the training)."""


@dataclass
class FolderData(DataConfig):
    """Image files on disk: `train/` and `val/`, or class folders, or a flat folder without labels."""

    path: str = MISSING
    """Folder of the images."""


@dataclass
class ParquetData(DataConfig):
    """A folder of parquet files in the Hugging Face `datasets` image layout, or one written by `save_to_disk`."""

    path: str = MISSING
    """Folder of `train*.parquet` (and `val*`, `validation*` or `test*`), or of `Dataset.save_to_disk`."""
    image_column: str = "image"
    """Column of the encoded images."""
    label_column: str | None = "label"
    """Column of the integer labels; null for images without labels."""


@dataclass
class TorchvisionData(DataConfig):
    """A data set of torchvision: `cifar10`, `cifar100` or `stl10` (which trains on its unlabelled images too)."""

    name: str = MISSING
    """`cifar10`, `cifar100` or `stl10`."""
    path: str = "data"
    """Folder for the download."""
    download: bool = True
    """Download the data when `path` lacks it."""
