"""Loads the network of `checkpoint=…`: from this package, the original, timm or transformers, or untrained."""

import difflib
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from torch import nn

from dino_lightning.checkpoints import huggingface
from dino_lightning.checkpoints.description import Description, build_seeded
from dino_lightning.checkpoints.hub import HUB_PREFIX, download
from dino_lightning.checkpoints.original import (
    KEYS,
    Weights,
    backbone_weights,
    check_names_and_shapes,
    identify_network,
    num_heads_in_args,
    only_tensors,
    shorten,
    strip_prefix,
    without_mask_token,
)
from dino_lightning.checkpoints.safe_read import check_finite, read_pickle, read_safetensors
from dino_lightning.checkpoints.timm_weights import load_pretrained, timm_description
from dino_lightning.config.paths import usable_path
from dino_lightning.config.registry import backbone_config, backbone_names
from dino_lightning.errors import UserError, did_you_mean
from dino_lightning.models.frozen import FrozenNetwork

TIMM, UNTRAINED = "timm:", "untrained:"
SUFFIXES = (".safetensors", ".ckpt", ".pth", ".pt", ".bin")
EXPORTED, LAST = tuple(f"{key}.safetensors" for key in KEYS), "checkpoints/last.ckpt"


def load_network(checkpoint: str, *, key: str | None = None, seed: int = 0) -> FrozenNetwork:
    """The frozen network that `checkpoint` names, in eval mode on the CPU.

    `checkpoint` is a run's folder, its `teacher.safetensors` or `student.safetensors`, a `.ckpt`; a `.pth` of the
    original (a backbone or a full checkpoint); `timm:NAME`; `hf:OWNER/NAME` or a folder of transformers; or
    `untrained:` followed by any of these or by the name of a file in `conf/backbone`. `key` selects `teacher` or
    `student` if the file has both; None selects the network that the run evaluated. `seed` draws untrained weights.
    Raises `UserError` for anything else.
    """
    if key is not None and key not in KEYS:
        raise UserError(f"checkpoint_key={key}: {did_you_mean(key, KEYS)}")
    if checkpoint.startswith(UNTRAINED):
        return _load_untrained(checkpoint.removeprefix(UNTRAINED), key=key, seed=seed)
    if checkpoint.startswith(TIMM):
        source = f"checkpoint={checkpoint}"
        name = checkpoint.removeprefix(TIMM)
        description = timm_description(name, source=source)
        backbone = load_pretrained(name, description, source=source)
        return _frozen_network(backbone.eval().requires_grad_(False), description, name=checkpoint)
    return _load_file(checkpoint, key=key)


def with_fresh_weights(network: FrozenNetwork, *, seed: int) -> FrozenNetwork:
    """The same architecture with random weights drawn by `seed`; the global random state does not change."""
    backbone = build_seeded(network.rebuild, seed=seed)
    return replace(
        network, backbone=backbone, name="untrained", digest=weights_digest(backbone.state_dict()), trained=False
    )


def weights_digest(weights: Weights) -> str:
    """First 16 hexadecimal digits of the SHA-256 of names and values, sorted by name."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _frozen_network(backbone: nn.Module, description: Description, *, name: str) -> FrozenNetwork:
    return FrozenNetwork(
        backbone,
        name=name,
        digest=weights_digest(backbone.state_dict()),
        mean=description.mean,
        std=description.std,
        resize=description.resize,
        size=description.size,
        rebuild=description.build,
        description=description.to_dict(),
    )


def _load_untrained(name: str, *, key: str | None, seed: int) -> FrozenNetwork:
    source = f"checkpoint={UNTRAINED}{name}"
    if name.startswith(TIMM):
        description = timm_description(name.removeprefix(TIMM), source=source)
    elif name in backbone_names():
        description = Description(backbone_config(name))
    elif _is_timm(name) and not Path(name).exists():
        description = timm_description(name, source=source)
    elif not usable_path("checkpoint", name).exists() and _is_network_name(name):
        known = [*backbone_names(), *timm.list_models()]
        raise UserError(
            f"{source}: '{name}' is neither a file, nor a file in conf/backbone, nor a timm network; "
            f"{did_you_mean(name, known)}"
        )
    else:
        return with_fresh_weights(_load_file(name, key=key, prefix=UNTRAINED), seed=seed)
    backbone = build_seeded(description.build, seed=seed)
    return replace(_frozen_network(backbone, description, name="untrained"), trained=False)


def _is_network_name(name: str) -> bool:
    """Whether the string looks like the name of a network rather than a path."""
    return bool(name) and Path(name).name == name and Path(name).suffix not in SUFFIXES


def _is_timm(name: str) -> bool:
    return timm.is_model(name.split(".")[0])


# ----------------------------------------------------------------------------------------------------------- files


def _load_file(checkpoint: str, *, key: str | None, prefix: str = "") -> FrozenNetwork:
    source = f"checkpoint={prefix}{checkpoint}"
    if not checkpoint:
        raise UserError(f"{source} is empty; expected the folder of a run, a file with weights or timm:NAME.")
    if checkpoint.startswith(HUB_PREFIX):
        path, name = download(checkpoint.removeprefix(HUB_PREFIX), source=source), checkpoint
    else:
        path = _resolve_file(usable_path("checkpoint", checkpoint), key=key, source=source)
        name = _display_name(path)
    with _naming_source(source, "contains no weights of a known network"):
        weights, description = _read_weights(path, key=key, source=source)
    backbone = _build_verified(weights, description, file_bytes=path.stat().st_size, source=source)
    check_finite(backbone.state_dict(), source=source)
    return _frozen_network(backbone, description, name=name + (" (student)" if key == "student" else ""))


def _read_weights(path: Path, *, key: str | None, source: str) -> tuple[Weights, Description]:
    if path.name in huggingface.WEIGHTS and huggingface.is_model_folder(path.parent):
        if key == "student":
            raise UserError(
                f"checkpoint_key=student: {source} contains only one network; leave checkpoint_key=teacher."
            )
        return huggingface.read_folder(path, source=source)
    if path.suffix == ".safetensors":
        return _read_exported(path, key=key, source=source)
    content = read_pickle(path, source=source)
    huggingface.refuse_timm(path, source=source)
    if _is_training_checkpoint(content):
        return _read_training_checkpoint(content, key=key, source=source)
    weights = backbone_weights(content, key=key or KEYS[0], source=source)
    return identify_network(weights, heads=num_heads_in_args(content), source=source)


def _resolve_file(path: Path, *, key: str | None, source: str) -> Path:
    """The weight file for a path to a file or folder. Raises `UserError` if there is none."""
    if path.is_dir():
        own_files = [path / name for name in EXPORTED if key is None or name.startswith(key)] + [path / LAST]
        candidates = [*own_files, *(path / name for name in huggingface.WEIGHTS)]
        file = next((file for file in candidates if file.is_file()), None)
        if file is None:
            *names, last = (str(file.relative_to(path)) for file in own_files)
            missing = f"{', '.join(names)} or {last}" if names else last
            raise UserError(
                f"{source} is a folder without {missing}; expected the folder of a run or a file with weights."
            )
        return file
    if path.is_file():
        return path
    untrained = f"checkpoint={UNTRAINED}{path} for an untrained network."
    if _is_timm(str(path)):
        advice = f"use checkpoint={TIMM}{path} for timm's weights, or {untrained}"
    elif str(path) in backbone_names():
        advice = f"use {untrained}"
    else:
        advice = _similar_path(path)
    raise UserError(f"{source}: this file does not exist; {advice}")


def _similar_path(path: Path) -> str:
    """A clause with an existing path that is similar to a missing one."""
    folder = next(parent for parent in path.absolute().parents if parent.is_dir())
    missing = path.absolute().relative_to(folder).parts[0]
    entries = [entry for entry in folder.iterdir() if entry.is_dir() or entry.suffix in SUFFIXES]
    names = sorted(entry.name for entry in entries if entry != _output_folder())
    if similar := difflib.get_close_matches(missing, names, n=1):
        return f"did you mean '{folder / similar[0]}'?"
    return f"{folder} contains {shorten(names)}." if names else f"{folder} contains no checkpoint."


def _output_folder() -> Path | None:
    """The folder that Hydra has made for this command, which has no weights; None outside of a command."""
    if not HydraConfig.initialized():
        return None
    hydra = HydraConfig.get()
    return Path(hydra.sweep.dir if hydra.mode == RunMode.MULTIRUN else hydra.runtime.output_dir).absolute()


def _display_name(path: Path) -> str:
    """The name of a file in tables, which includes the name of its run if it belongs to one."""
    if path.name in (*EXPORTED, *huggingface.WEIGHTS):
        return path.resolve().parent.name
    run = path.resolve().parents[1] if path.suffix == ".ckpt" and path.resolve().parent.name == "checkpoints" else None
    return f"{run.name}/{path.stem}" if run else path.stem


def _read_exported(path: Path, *, key: str | None, source: str) -> tuple[Weights, Description]:
    """Weights and description of a safetensors file."""
    weights, metadata = read_safetensors(path, source=source)
    exported_key = path.stem if path.name in EXPORTED else KEYS[0]
    if key not in (None, exported_key):
        raise UserError(f"checkpoint_key={key}: {source} contains only the {exported_key}; use the run's {LAST}.")
    if "classifier" in metadata:  # a backbone with a classifier on top, written by eval=finetune
        prefix = metadata["classifier"] + "."
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith(prefix)}
    if "network" in metadata:
        return weights, _parse_description(metadata["network"], source=source)
    huggingface.refuse_timm(path, source=source)
    return identify_network(backbone_weights(weights, key=KEYS[0], source=source), source=source)


def _is_training_checkpoint(content: dict[str, Any]) -> bool:
    """Whether a training run of this package wrote the file."""
    state, prefixes = content.get("state_dict"), tuple(f"{key}.backbone." for key in KEYS)
    return isinstance(state, dict) and any(str(name).startswith(prefixes) for name in state)


def _read_training_checkpoint(content: dict[str, Any], *, key: str | None, source: str) -> tuple[Weights, Description]:
    key = key or content.get("evaluated", KEYS[0])
    weights = without_mask_token(strip_prefix(only_tensors(content["state_dict"]), f"{key}.backbone."))
    if not weights:
        raise UserError(f"checkpoint_key={key}: {source} does not contain a {key}.")
    if isinstance(content.get("network"), dict):
        return weights, _parse_description(content["network"], source=source)
    return identify_network(weights, source=source)


def _parse_description(stored: str | dict[str, Any], *, source: str) -> Description:
    """A file's description of its network, which another version of this package may have written."""
    try:
        return Description.from_dict(json.loads(stored) if isinstance(stored, str) else stored)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{source}: this version cannot read its description of the network ({reason}).") from error


def _build_verified(weights: Weights, description: Description, *, file_bytes: int, source: str) -> nn.Module:
    """The described network with these weights, frozen and in eval mode, on the CPU.

    The network is first built on the meta device, so that a wrong description cannot exhaust the memory. `file_bytes`
    is the size of the file with the weights, `source` names it in errors. Raises `UserError` if they do not fit.
    """
    for name, tensor in weights.items():
        dense = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
        # A view (an expanded tensor) can claim more memory than the file contains.
        if not dense or not tensor.nbytes <= tensor.untyped_storage().nbytes() <= file_bytes:
            raise UserError(f"{source} is damaged: it does not contain the values of {shorten([str(name)])}.")
    with _naming_source(source, f"describes a network that cannot be built ({description})"), torch.device("meta"):
        expected = description.build().state_dict()
    check_names_and_shapes(expected, weights, source=source, target=f"the detected architecture ({description})")
    backbone = build_seeded(description.build, seed=0)
    with _naming_source(source, f"contains weights that cannot be copied into {description}"):
        backbone.load_state_dict(weights, strict=False)
    return backbone


@contextmanager
def _naming_source(source: str, problem: str) -> Iterator[None]:
    """Convert any error that a library raises for a file's content into a `UserError` that names the file."""
    try:
        yield
    except UserError as error:
        if source in str(error):
            raise
        raise UserError(f"{source} {problem}: {error}") from error
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{source} {problem} ({type(error).__name__}{': ' * bool(reason)}{reason}).") from error
