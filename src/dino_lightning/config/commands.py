"""The keys of the commands that read a finished network: `dino eval`, `dino embed` and `dino export`."""

from dataclasses import dataclass, field
from typing import Annotated

from omegaconf import MISSING

from dino_lightning.config.data import DataConfig, ImagesConfig
from dino_lightning.config.evaluation import EvaluationConfig
from dino_lightning.config.loggers import LoggerConfig
from dino_lightning.config.ranges import AtLeast, FilePath, OneOf, Seed
from dino_lightning.config.trainer import DevicesConfig

FORMATS = {"timm": "", "huggingface": "", "onnx": ".onnx", "torch": ".pt2", "original": ".pth"}
"""Format -> file extension; empty for a folder."""


@dataclass
class NetworkConfig:
    """A command that reads a network; one of the classes below."""

    checkpoint: str = MISSING
    """The network: the folder of a run, its `.safetensors` or `.ckpt` file, a `.pth` file of the original DINO,
    `timm:NAME` for timm's published weights, or `hf:OWNER/NAME` or a folder for transformers. `untrained:` before any
    of these, or before an option of `backbone`, gives the network random weights."""
    checkpoint_key: Annotated[str | None, OneOf("teacher", "student")] = None
    """Network to use if the checkpoint contains both; null uses the one that the run evaluated, and the teacher of
    files from elsewhere."""
    imports: list[str] = field(default_factory=list)
    """Your Python files or modules, such as a backbone that `checkpoint` needs or an evaluation; imported first."""


@dataclass
class FeaturesConfig(NetworkConfig):
    """A command that computes features of images; one of the classes below."""

    trainer: DevicesConfig = field(default_factory=DevicesConfig)
    """Devices and precision."""
    seed: Annotated[int, Seed] = 0
    """Random seed of subsets, splits and untrained networks."""
    cpu_threads: Annotated[int | None, AtLeast(1)] = None
    """Number of PyTorch threads on a CPU; null divides the cores among the devices."""
    feature_cache: Annotated[str | None, FilePath] = "~/.cache/dino-lightning/features"
    """Folder in which `dino eval` and `dino embed` cache finished blocks of features by the content of weights and
    images, so that an interrupted command continues where it was; null disables the cache."""


@dataclass
class EvaluateConfig(FeaturesConfig):
    """One evaluation of one network, with `dino eval`."""

    eval: EvaluationConfig = MISSING
    """The evaluation."""
    baseline: bool = False
    """Also evaluate the same network with random weights."""
    data: ImagesConfig = MISSING
    """The images."""
    logger: LoggerConfig = MISSING
    """Destination of the results in addition to `results.jsonl`: `csv` (no other) or `wandb`."""
    output_dir: Annotated[str, FilePath] = MISSING
    """Output folder. Results are appended to its `results.jsonl`."""


@dataclass
class EmbedConfig(FeaturesConfig):
    """Features of many images, in one file: `dino embed`."""

    features: Annotated[str, OneOf("class", "mean_patch")] = "class"
    """Features of an image: `class` is a ViT's class token (the pooled features of other networks), `mean_patch` is the
    mean of the last block's patch tokens."""
    n_last_blocks: Annotated[int, AtLeast(1)] = 1
    """Number of last blocks whose class tokens are concatenated, deepest last; above 1 only for a ViT's
    `features=class`."""
    image_size: Annotated[int | None, AtLeast(1)] = None
    """Side of the center crop (pixels); null uses the size with which the checkpoint was evaluated."""
    image_resize: Annotated[int | None, AtLeast(2)] = None
    """Shorter side before the center crop (pixels); null keeps the checkpoint's ratio to `image_size`."""
    batch_size_per_device: Annotated[int | None, AtLeast(1)] = None
    """Images per forward pass and device; null uses the number that has as many pixels as 256 images with side 224, at
    most 1024."""
    data: DataConfig = MISSING
    """The images. No images are held out, and unreadable ones never stop the program (`max_bad_share` is 1)."""
    split: Annotated[str, OneOf("all", "train", "val")] = "all"
    """Split: `train`, `val`, or `all`, with the validation images after the training images."""
    output: Annotated[str, FilePath] = MISSING
    """Output file: `.parquet` (columns `name`, `label`, `embedding`), or `.npy` with the names in a `.csv` file next to
    it."""
    overwrite: bool = False
    """Overwrite an existing `output`."""


@dataclass
class ExportConfig(NetworkConfig):
    """One network in another program's format: `dino export`."""

    format: Annotated[str, OneOf(*FORMATS)] = MISSING
    """Output format: `timm` and `huggingface` write a folder with a model card that `timm.create_model` or
    `transformers.AutoModel` loads; `onnx` writes a graph for ONNX Runtime and others; `torch` writes a program of
    `torch.export`; `original` writes a state dict with the names of facebookresearch/dino."""
    output: Annotated[str, FilePath] = MISSING
    """Output path, which must not exist: a folder for `timm` and `huggingface`, otherwise a file that ends in `.onnx`,
    `.pt2` or `.pth`."""
    image_size: Annotated[int | None, AtLeast(1)] = None
    """Side of the square images that `onnx` and `torch` accept (pixels); null accepts any size if the network does."""
