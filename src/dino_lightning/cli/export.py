"""`dino export`: one network in another program's format.

    dino export checkpoint=outputs/RUN format=huggingface output=FOLDER

Exit status: 0, or 2 where a setting, a file or the combination is wrong, in one sentence.
"""

import argparse
import sys
from pathlib import Path
from typing import cast

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from rich.console import Console

from dino_lightning.cli.errors import EXPLAINED, message_for, refuse_number
from dino_lightning.cli.overrides import quote_overrides
from dino_lightning.cli.train import CONF
from dino_lightning.config import register
from dino_lightning.config.constraints import check_keys
from dino_lightning.config.docs import all_keys
from dino_lightning.config.export import FORMATS, ExportConfig
from dino_lightning.config.paths import usable_path
from dino_lightning.errors import UserError, did_you_mean

EXAMPLES = """examples:
  dino export checkpoint=outputs/RUN format=timm output=FOLDER              timm.create_model("local-dir:FOLDER")
  dino export checkpoint=outputs/RUN format=huggingface output=FOLDER       transformers.AutoModel.from_pretrained
  dino export checkpoint=outputs/RUN format=onnx output=backbone.onnx       images of any number and size
  dino export checkpoint=outputs/RUN format=torch output=backbone.pt2       torch.export.load
  dino export checkpoint=outputs/RUN format=original output=backbone.pth    facebookresearch/dino

checkpoint= takes what dino eval takes, checkpoint_key= as well; docs/weights.md says more."""


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    words = parse(sys.argv[1:] if argv is None else argv)
    try:
        export(compose_config(words))
    except EXPLAINED as error:
        print(f"dino export: {message_for(error, conf=CONF)}", file=sys.stderr)
        return 2
    except OverflowError as error:
        refuse_number(error, program="dino export")
    return 0


def parse(argv: list[str]) -> list[str]:
    """The words `key=value`."""
    parser = argparse.ArgumentParser(
        prog="dino export",
        description="One network in another program's format.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("words", nargs="*", metavar="key=value", help="checkpoint, format, output and others")
    return parser.parse_args(argv).words


def compose_config(words: list[str]) -> ExportConfig:
    """The checked configuration."""
    register()
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        composed = compose("export", overrides=quote_overrides(words))
    check_keys(composed)
    for key in sorted(OmegaConf.missing_keys(composed)):
        doc = next(known.doc for known in all_keys() if (known.name, known.schema) == (key, ExportConfig))
        raise UserError(f"{key} has no value: give it on the command line, {key}=…; it is: {doc}")
    config = cast(ExportConfig, OmegaConf.to_object(composed))
    check(config)
    return config


def check(config: ExportConfig) -> None:
    """Refuse what can be told without the weights."""
    if config.format not in FORMATS:
        raise UserError(f"format={config.format}: {did_you_mean(config.format, FORMATS)}")
    output, ending = usable_path("output", config.output), FORMATS[config.format]
    if output.suffix != ending if ending else output.suffix in FORMATS.values() and output.suffix:
        what = f"a file that ends in {ending}" if ending else "a folder"
        raise UserError(f"output={config.output}: format={config.format} writes {what}.")
    if not output.name:
        raise UserError(f"output={config.output} has no name; expected a new file or folder.")
    if output.exists():
        raise UserError(f"output={config.output} already exists; remove it or choose another name.")
    if config.image_size is None:
        return
    if config.format not in ("onnx", "torch"):
        raise UserError(f"image_size={config.image_size} belongs to format=onnx and format=torch; leave it out.")
    if config.image_size < 1:
        raise UserError(f"image_size={config.image_size}: expected at least 1 pixel.")


def export(config: ExportConfig) -> None:
    """Load, write, and say what came of it."""
    from dino_lightning.checkpoints import load_network  # torch loads in seconds: not needed for --help
    from dino_lightning.checkpoints.formats import check_format, export_network
    from dino_lightning.models.tokens import is_vit, patch_size

    check_format(config.format)
    network = load_network(config.checkpoint, key=config.checkpoint_key)
    if config.image_size and is_vit(network.backbone) and config.image_size % patch_size(network.backbone):
        raise UserError(
            f"image_size={config.image_size} is not a multiple of the patch size "
            f"{patch_size(network.backbone)} of {network.name}."
        )
    output = Path(config.output).expanduser()
    console = Console(stderr=True, highlight=False, force_jupyter=False)  # whose bars want ipywidgets
    with console.status(f"writing {output.name} and comparing it with {network.name}"):
        told = export_network(
            network, output, format=config.format, checkpoint=config.checkpoint, image_size=config.image_size
        )
    console.print(f"{output}: {network.name}, {told}", soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
