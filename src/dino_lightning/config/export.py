"""Weights in the formats of other programs: the keys of `dino export`."""

from dataclasses import dataclass
from typing import Annotated

from omegaconf import MISSING

from dino_lightning.config.ranges import AtLeast, FilePath, OneOf

FORMATS = {"timm": "", "huggingface": "", "onnx": ".onnx", "torch": ".pt2", "original": ".pth"}
"""Format -> ending of the file that it is; none where it is a folder."""


@dataclass
class ExportConfig:
    """One network in another program's format: `dino export`."""

    checkpoint: str = MISSING
    """The network: whatever `checkpoint` of an evaluation takes."""
    checkpoint_key: Annotated[str | None, OneOf("teacher", "student")] = None
    """Which network of a checkpoint that holds several: `teacher` or `student`; null for the one that the run
    evaluated, and for the teacher of files of another origin."""
    format: Annotated[str, OneOf(*FORMATS)] = MISSING
    """`timm` or `huggingface`: a folder that `timm.create_model` or `transformers.AutoModel` loads, with a model card;
    `onnx`: a graph for ONNX Runtime and others; `torch`: a program of `torch.export`; `original`: a state dict with the
    names of facebookresearch/dino."""
    output: Annotated[str, FilePath] = MISSING
    """What to write, which must not exist: a folder for `timm` and `huggingface`, otherwise a file that ends in
    `.onnx`, `.pt2` or `.pth`."""
    image_size: Annotated[int | None, AtLeast(1)] = None
    """One side of square images that `onnx` and `torch` take (pixels); null for images of any size, where the network
    can."""
