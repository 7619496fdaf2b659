"""`checkpoint=…` as a network: our runs, the original's files, timm's names, and fresh weights for each of them."""

import difflib
import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from timm.models import get_pretrained_cfg
from torch import nn

from dino_lightning.checkpoints import huggingface
from dino_lightning.checkpoints import timm_weights as published
from dino_lightning.checkpoints.description import INVALID_DESCRIPTION, PAPER_CROPS, Description, build_seeded
from dino_lightning.checkpoints.fitting import build_verified, naming_source
from dino_lightning.checkpoints.hub import HUB_PREFIX, download
from dino_lightning.checkpoints.original import (
    KEYS,
    Weights,
    backbone_weights,
    identify_network,
    num_heads_in_args,
    only_tensors,
    shorten,
    strip_prefix,
    without_mask_token,
)
from dino_lightning.checkpoints.safe_read import check_finite, read_pickle, read_safetensors
from dino_lightning.config import TimmConfig
from dino_lightning.config.conf_dir import backbone_config, backbone_names
from dino_lightning.config.paths import usable_path
from dino_lightning.errors import UserError, did_you_mean
from dino_lightning.models.frozen import FrozenNetwork

TIMM, UNTRAINED = "timm:", "untrained:"
SUFFIXES = (".safetensors", ".ckpt", ".pth", ".pt", ".bin")
EXPORTED, LAST = tuple(f"{key}.safetensors" for key in KEYS), "checkpoints/last.ckpt"


def load_network(checkpoint: str, *, key: str | None = None, seed: int = 0) -> FrozenNetwork:
    """The frozen network that `checkpoint` names, in eval mode on the CPU.

    A run's folder, its `teacher.safetensors` or `student.safetensors`, a `.ckpt`; a `.pth` of the original, a backbone
    or a full checkpoint; `timm:NAME`; `hf:OWNER/NAME` or a folder of transformers; `untrained:` before any of these or
    before a file of `conf/backbone`. `key` is
    `teacher` or `student` of what holds both, None the one that the run evaluated; `seed` draws fresh weights. Raises
    `UserError` for whatever is none of these.
    """
    if key is not None and key not in KEYS:
        raise UserError(f"checkpoint_key={key}: {did_you_mean(key, KEYS)}")
    if checkpoint.startswith(UNTRAINED):
        return _load_untrained(checkpoint.removeprefix(UNTRAINED), key=key, seed=seed)
    if checkpoint.startswith(TIMM):
        source = f"checkpoint={checkpoint}"
        name = checkpoint.removeprefix(TIMM)
        description = published.timm_description(name, source=source)
        backbone = published.load_pretrained(name, description, source=source)
        return _frozen_network(backbone.eval().requires_grad_(False), description, name=checkpoint)
    return _load_file(checkpoint, key=key)


def with_fresh_weights(network: FrozenNetwork, *, seed: int) -> FrozenNetwork:
    """The same architecture with fresh weights, drawn by `seed`; the global random state stays as it was."""
    backbone = build_seeded(network.rebuild, seed=seed)
    return replace(
        network, backbone=backbone, name="untrained", digest=weights_digest(backbone.state_dict()), trained=False
    )


def weights_digest(weights: Weights) -> str:
    """SHA-256 of names and values in the order of names, the first 16 hexadecimal digits."""
    found = hashlib.sha256()
    for name in sorted(weights):
        found.update(name.encode())
        found.update(weights[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


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


def _load_untrained(what: str, *, key: str | None, seed: int) -> FrozenNetwork:
    source = f"checkpoint={UNTRAINED}{what}"
    if what.startswith(TIMM):
        description = published.timm_description(what.removeprefix(TIMM), source=source)
    elif what in backbone_names():
        description = Description(backbone_config(what))
    elif _is_timm(what) and not Path(what).exists():
        description = published.timm_description(what, source=source)
    elif not usable_path("checkpoint", what).exists() and _is_name(what):
        known = [*backbone_names(), *timm.list_models()]
        raise UserError(
            f"{source}: '{what}' is no file, no file of conf/backbone and no network of timm; "
            f"{did_you_mean(what, known)}"
        )
    else:
        return with_fresh_weights(_load_file(what, key=key, prefix=UNTRAINED), seed=seed)
    backbone = build_seeded(description.build, seed=seed)
    return replace(_frozen_network(backbone, description, name="untrained"), trained=False)


def _is_name(what: str) -> bool:
    """Whether it looks like the name of a network rather than a path."""
    return bool(what) and Path(what).name == what and Path(what).suffix not in SUFFIXES


def _is_timm(name: str) -> bool:
    return timm.is_model(name.split(".")[0])


# ----------------------------------------------------------------------------------------------------------- files


def _load_file(checkpoint: str, *, key: str | None, prefix: str = "") -> FrozenNetwork:
    source = f"checkpoint={prefix}{checkpoint}"
    if not checkpoint:
        raise UserError(f"{source} names nothing; expected the folder of a run, a file of weights or timm:NAME.")
    if checkpoint.startswith(HUB_PREFIX):
        path, name = download(checkpoint.removeprefix(HUB_PREFIX), source=source), checkpoint
    else:
        path = _resolve_file(usable_path("checkpoint", checkpoint), key=key, source=source)
        name = _display_name(path)
    with naming_source(source, "holds no weights of a network that is known"):
        weights, description = _read_weights(path, key=key, source=source)
    backbone = build_verified(weights, description, file_bytes=path.stat().st_size, source=source)
    check_finite(backbone.state_dict(), source=source)
    return _frozen_network(backbone, description, name=name + (" (student)" if key == "student" else ""))


def _read_weights(path: Path, *, key: str | None, source: str) -> tuple[Weights, Description]:
    if path.name in huggingface.WEIGHTS and huggingface.is_model_folder(path.parent):
        if key == "student":
            raise UserError(f"checkpoint_key=student: {source} holds one network; leave checkpoint_key=teacher.")
        return huggingface.read_folder(path, source=source)
    if path.suffix == ".safetensors":
        return _read_exported(path, key=key, source=source)
    content = read_pickle(path, source=source)
    huggingface.refuse_timm(path, source=source)
    if _is_training_checkpoint(content):
        return _read_training_checkpoint(content, path, key=key, source=source)
    weights = backbone_weights(content, key=key or KEYS[0], source=source)
    return identify_network(weights, heads=num_heads_in_args(content), source=source)


def _resolve_file(path: Path, *, key: str | None, source: str) -> Path:
    """The file of weights that a path means. Raises `UserError` where there is none."""
    if path.is_dir():
        found = [path / name for name in EXPORTED if key is None or name.startswith(key)] + [path / LAST]
        others = [path / name for name in huggingface.WEIGHTS]
        file = next((file for file in (*found, *others) if file.is_file()), None)
        if file is None:
            *names, last = (str(file.relative_to(path)) for file in found)
            wanted = f"{', '.join(names)} or {last}" if names else last
            raise UserError(
                f"{source} is a folder without {wanted}; expected the folder of a run, or a file of weights."
            )
        return file
    if path.is_file():
        return path
    if _is_timm(str(path)):
        raise UserError(
            f"{source}: there is no such file; for timm's weights write checkpoint={TIMM}{path}, for fresh "
            f"ones checkpoint={UNTRAINED}{path}."
        )
    if str(path) in backbone_names():
        raise UserError(f"{source}: there is no such file; for fresh weights write checkpoint={UNTRAINED}{path}.")
    raise UserError(f"{source}: there is no such file; {_nearest_path(path)}")


def _nearest_path(path: Path) -> str:
    """A clause that leads from a path that does not exist to one that does."""
    folder = next(parent for parent in path.absolute().parents if parent.is_dir())
    missing = path.absolute().relative_to(folder).parts[0]
    names = sorted(each.name for each in folder.iterdir() if each.is_dir() or each.suffix in SUFFIXES)
    close = difflib.get_close_matches(missing, names, n=1)
    if close:
        return f"did you mean '{folder / close[0]}'?"
    return f"in {folder} there are {shorten(names)}." if names else f"in {folder} there is no checkpoint."


def _display_name(path: Path) -> str:
    """A file's name in tables: that of its run, where it has one."""
    if path.name in (*EXPORTED, *huggingface.WEIGHTS):
        return path.resolve().parent.name
    run = path.resolve().parents[1] if path.suffix == ".ckpt" and path.resolve().parent.name == "checkpoints" else None
    return f"{run.name}/{path.stem}" if run else path.stem


def _read_exported(path: Path, *, key: str | None, source: str) -> tuple[Weights, Description]:
    """Weights of a safetensors file, and what it or the run beside it says of them."""
    weights, metadata = read_safetensors(path, source=source)
    held = path.stem if path.name in EXPORTED else KEYS[0]
    if key not in (None, held):
        raise UserError(f"checkpoint_key={key}: {source} holds the {held} only; a run's {LAST} holds what it has.")
    config = path.parent / "config.yaml"
    if "classifier" in metadata:  # of eval=finetune, above the backbone
        top = metadata["classifier"] + "."
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith(top)}
    if "network" in metadata:
        return weights, _parse_description(lambda: Description.from_dict(json.loads(metadata["network"])), source)
    if config.is_file():
        return weights, _description_of_run(config, source=source)
    if "timm" in metadata:
        return weights, _parse_description(
            lambda: _description_of_timm_arguments(weights, metadata, source=source), source
        )
    huggingface.refuse_timm(path, source=source)
    return identify_network(backbone_weights(weights, key=KEYS[0], source=source), source=source)


def _is_training_checkpoint(content: dict[str, Any]) -> bool:
    """Whether a file is a checkpoint of training with this package."""
    state, prefixes = content.get("state_dict"), tuple(f"{key}.backbone." for key in KEYS)
    return isinstance(state, dict) and any(str(name).startswith(prefixes) for name in state)


def _read_training_checkpoint(
    content: dict[str, Any], path: Path, *, key: str | None, source: str
) -> tuple[Weights, Description]:
    """Weights of a checkpoint of ours. The architecture stands in it, or in the folder of its run in older ones."""
    key = key or content.get("evaluated", KEYS[0])
    weights = without_mask_token(strip_prefix(only_tensors(content["state_dict"]), f"{key}.backbone."))
    if not weights:
        raise UserError(f"checkpoint_key={key}: {source} does not hold it.")
    if isinstance(content.get("network"), dict):
        return weights, _parse_description(lambda: Description.from_dict(content["network"]), source)
    config = path.resolve().parents[1] / "config.yaml"
    if config.is_file():
        return weights, _description_of_run(config, source=source)
    return identify_network(weights, source=source)


def _parse_description(describe: Callable[[], Description], source: str) -> Description:
    """What `describe` makes of a file's own words, which another version or program may have written."""
    try:
        return describe()
    except UserError:
        raise
    except INVALID_DESCRIPTION as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{source}: its description of the network is not of this version ({reason}).") from error


def _description_of_run(config: Path, *, source: str) -> Description:
    try:
        return Description.of_run(yaml.safe_load(config.read_text()))
    except (OSError, yaml.YAMLError, *INVALID_DESCRIPTION) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{source}: {config} is not the configuration of a run ({reason}).") from error


def _description_of_timm_arguments(weights: Weights, metadata: dict[str, str], *, source: str) -> Description:
    """From the arguments of `timm.create_model` alone, which are all that the first version wrote.

    A ViT is taken for an `OriginalViT`, with which nearly all were trained.
    """
    recipe = json.loads(metadata["timm"])
    name, size = recipe.pop("model_name"), recipe.pop("img_size", None)
    if size is None:
        settings = get_pretrained_cfg(name)
        size = settings.input_size[-1] if settings else PAPER_CROPS.global_size
    seen = {key: json.loads(metadata[key]) for key in ("mean", "std")} | {"size": size, "resize": round(size * 8 / 7)}
    if name.startswith("vit_"):
        _, description = identify_network(weights, heads=recipe.get("num_heads"), source=source, **seen)
        return description
    arguments = {key: value for key, value in recipe.items() if key not in ("num_classes", "in_chans", "patch_size")}
    config = TimmConfig(name=name, patch_size=recipe.get("patch_size"), arguments=arguments)
    return Description(config, image_size=size, **seen)
