"""Convert a network to another format: timm, transformers, ONNX, torch, the original's.

usage: dino export CHECKPOINT format=FORMAT output=PATH

CHECKPOINT is checkpoint, as for dino eval.

Examples:
  dino export outputs/RUN format=timm output=FOLDER           timm.create_model("local-dir:FOLDER")
  dino export outputs/RUN format=huggingface output=FOLDER    transformers.AutoModel.from_pretrained
  dino export outputs/RUN format=onnx output=backbone.onnx    images of any number and size
  dino export outputs/RUN format=torch output=backbone.pt2    torch.export.load
  dino export outputs/RUN format=original output=backbone.pth     facebookresearch/dino
"""

from pathlib import Path
from typing import cast

from omegaconf import OmegaConf
from rich.console import Console

from dino_lightning.cli.errors import as_user_errors
from dino_lightning.cli.overrides import quote_overrides, with_plain_words
from dino_lightning.cli.program import compose_root
from dino_lightning.config.commands import FORMATS, ExportConfig
from dino_lightning.config.constraints import check_keys, check_values
from dino_lightning.errors import UserError


def main(words: list[str]) -> None:
    """Export as the words say."""
    with as_user_errors(verb="export"):
        export(compose_config(words))


def compose_config(words: list[str]) -> ExportConfig:
    """The checked configuration."""
    composed = compose_root("export", quote_overrides(with_plain_words(words, "checkpoint", verb="export")))
    check_keys(composed)
    config = cast(ExportConfig, OmegaConf.to_object(composed))
    check(config)
    return config


def check(config: ExportConfig) -> None:
    """Raise `UserError` for what is wrong whatever the weights are."""
    check_values(config)
    output, ending = Path(config.output).expanduser(), FORMATS[config.format]
    if output.suffix != ending if ending else output.suffix in FORMATS.values() and output.suffix:
        what = f"a file that ends in {ending}" if ending else "a folder"
        raise UserError(f"output={config.output}: format={config.format} writes {what}.")
    if not output.name:
        raise UserError(f"output={config.output} has no name; expected a new file or folder.")
    if output.exists():
        raise UserError(f"output={config.output} already exists; remove it or choose another name.")
    if config.image_size is not None and config.format not in ("onnx", "torch"):
        raise UserError(f"image_size={config.image_size} belongs to format=onnx and format=torch; leave it out.")


def export(config: ExportConfig) -> None:
    """Load the network, write it, and print where and how well it agrees."""
    from dino_lightning.checkpoints import load_network  # torch takes seconds to import
    from dino_lightning.checkpoints.formats import check_format, export_network
    from dino_lightning.models.frozen import check_size

    check_format(config.format)
    network = load_network(config.checkpoint, key=config.checkpoint_key)
    if config.image_size:
        check_size(network, config.image_size, key="image_size")
    output = Path(config.output).expanduser()
    console = Console(stderr=True, highlight=False, force_jupyter=False)  # its Jupyter bars need ipywidgets
    with console.status(f"writing {output.name} and comparing it with {network.name}"):
        summary = export_network(
            network, output, format=config.format, checkpoint=config.checkpoint, image_size=config.image_size
        )
    console.print(f"{output}: {network.name}, {summary}", soft_wrap=True)
