"""Weights in the formats of other programs: the keys of `dino export`."""

from dataclasses import dataclass, field
from typing import Annotated

from omegaconf import MISSING

from dino_lightning.config.ranges import AtLeast, FilePath, OneOf

FORMATS = {"timm": "", "huggingface": "", "onnx": ".onnx", "torch": ".pt2", "original": ".pth"}
"""Format -> file extension; empty for a folder."""


@dataclass
class ExportConfig:
    """One network in another program's format: `dino export`."""

    checkpoint: str = MISSING
    """The network, in any form that `checkpoint` of an evaluation accepts."""
    checkpoint_key: Annotated[str | None, OneOf("teacher", "student")] = None
    """Network to use if the checkpoint contains both; null uses the one that the run evaluated, and the teacher of
    files from elsewhere."""
    imports: list[str] = field(default_factory=list)
    """Python files or modules with backbones of your own that `checkpoint` needs; imported first."""
    format: Annotated[str, OneOf(*FORMATS)] = MISSING
    """Output format: `timm` and `huggingface` write a folder with a model card that `timm.create_model` or
    `transformers.AutoModel` loads; `onnx` writes a graph for ONNX Runtime and others; `torch` writes a program of
    `torch.export`; `original` writes a state dict with the names of facebookresearch/dino."""
    output: Annotated[str, FilePath] = MISSING
    """Output path, which must not exist: a folder for `timm` and `huggingface`, otherwise a file that ends in `.onnx`,
    `.pt2` or `.pth`."""
    image_size: Annotated[int | None, AtLeast(1)] = None
    """Side of the square images that `onnx` and `torch` accept (pixels); null accepts any size if the network does."""
