"""Exports a network in the format of another program; the output is read back and compared before it is kept."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from dino_lightning.checkpoints.description import Description
from dino_lightning.checkpoints.export import export_backbone
from dino_lightning.checkpoints.graphs import check_same, write_graph
from dino_lightning.checkpoints.huggingface import to_transformers
from dino_lightning.checkpoints.model_card import model_card
from dino_lightning.checkpoints.original import to_original
from dino_lightning.errors import UserError, cannot_be_written
from dino_lightning.models.frozen import FrozenNetwork
from dino_lightning.runtime.files import sync_folder

REQUIRED_PACKAGES = {"huggingface": ("transformers",), "onnx": ("onnx", "onnxscript", "onnxruntime")}
"""Format -> packages of the extra with the same name."""
USE_GRAPHS = "use format=onnx or format=torch, which support any network"


def check_format(format: str) -> None:
    """Raise `UserError` if a package that the format needs is not installed."""
    missing = [package for package in REQUIRED_PACKAGES.get(format, ()) if find_spec(package) is None]
    if missing:
        raise UserError(
            f"format={format} needs {', '.join(missing)}, which is not installed: pip install "
            f'"dino-lightning[{format}]".'
        )


def export_network(
    network: FrozenNetwork, output: Path, *, format: str, checkpoint: str, image_size: int | None
) -> str:
    """Write the network and return a description of the output.

    Raises `UserError` if the format does not support the network, if the exported network computes something else, or
    if it cannot be written; `output` then does not change.
    """
    try:
        with _atomic_output(output) as path:
            match format:
                case "onnx" | "torch":
                    return "takes " + write_graph(network, path, format=format, image_size=image_size)
                case "original":
                    return _write_original(network, path)
                case "timm":
                    return _write_timm(network, path, checkpoint=checkpoint)
                case "huggingface":
                    return _write_huggingface(network, path, checkpoint=checkpoint)
                case _:
                    raise TypeError(f"no format {format}")
    except OSError as error:
        raise cannot_be_written("output", output, error) from error


@contextmanager
def _atomic_output(output: Path) -> Iterator[Path]:
    """A temporary path that is renamed to `output` when the block succeeds and removed otherwise."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{output.stem}.", suffix=".part", dir=output.parent) as folder:
        path = Path(folder) / output.name
        yield path
        for file in [path] if path.is_file() else path.iterdir():
            with file.open("rb") as written:
                os.fsync(written.fileno())
        os.rename(path, output)
    sync_folder(output.parent)


def _write_original(network: FrozenNetwork, path: Path) -> str:
    with _suggest_other_formats():
        weights = to_original(_weights(network), _description(network), source="format=original")
    torch.save(weights, path)
    if network.mean == Description(_description(network).backbone).mean:
        return "state dict of tensors"
    return f"state dict of tensors, without the normalization of the images: mean {network.mean}, std {network.std}"


def _write_timm(network: FrozenNetwork, path: Path, *, checkpoint: str) -> str:
    path.mkdir()
    description = _description(network)
    recipe = export_backbone(_weights(network), path / "model.safetensors", description)
    if not recipe:
        raise UserError("format=timm: timm does not have this backbone; use format=onnx or torch.")
    arguments = {key: value for key, value in recipe.items() if key not in ("model_name", "num_classes")}
    # timm resizes images to the size of the position embedding.
    side = arguments.get("img_size", description.image_size)
    config = {
        "architecture": recipe["model_name"],
        "num_classes": 0,
        "num_features": network.width,
        "model_args": arguments,
        "pretrained_cfg": {
            "input_size": [network.channels, side, side],
            "fixed_input_size": hasattr(network.backbone, "pos_embed"),
            "mean": network.mean,
            "std": network.std,
            "crop_pct": network.size / network.resize,
            "interpolation": "bicubic",
        },
    }
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    loaded = timm.create_model(f"local-dir:{path}", pretrained=True).eval()
    check_same(network, loaded, side=side, format="timm", advice=USE_GRAPHS)
    (path / "README.md").write_text(model_card(network, checkpoint=checkpoint, kind="timm"))
    return 'folder for timm.create_model("local-dir:FOLDER", pretrained=True)'


def _write_huggingface(network: FrozenNetwork, path: Path, *, checkpoint: str) -> str:
    from transformers import AutoModel, BitImageProcessor, ResNetConfig, ViTConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    with _suggest_other_formats():
        settings, weights = to_transformers(_weights(network), _description(network), source="format=huggingface")
    description, is_vit = _description(network), "patch_size" in settings
    settings |= {"num_channels": network.channels, "architectures": ["ViTModel" if is_vit else "ResNetModel"]}
    path.mkdir()
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    (ViTConfig if is_vit else ResNetConfig)(**settings).save_pretrained(path)
    BitImageProcessor(
        size={"shortest_edge": network.resize},
        crop_size={"height": network.size, "width": network.size},
        resample=3,  # bicubic
        image_mean=network.mean,
        image_std=network.std,
        do_convert_rgb=network.channels == 3,
    ).save_pretrained(path)
    loaded = AutoModel.from_pretrained(path, **({"add_pooling_layer": False} if is_vit else {})).eval()

    def features(images: Tensor) -> Tensor:
        output = loaded(images)
        return output.last_hidden_state[:, 0] if is_vit else output.pooler_output.flatten(1)

    check_same(network, features, side=description.image_size, format="huggingface", advice=USE_GRAPHS)
    card = model_card(network, checkpoint=checkpoint, kind="vit" if is_vit else "resnet")
    (path / "README.md").write_text(card)
    return f"folder for transformers.AutoModel.from_pretrained, a {type(loaded).__name__}"


def _weights(network: FrozenNetwork) -> dict[str, Tensor]:
    return dict(network.backbone.state_dict())


def _description(network: FrozenNetwork) -> Description:
    assert network.description is not None
    return Description.from_dict(network.description)


@contextmanager
def _suggest_other_formats() -> Iterator[None]:
    """Add the formats for any network to the error for an unsupported network."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{str(error).rstrip('.')}; formats for any network are timm, onnx and torch.") from error
