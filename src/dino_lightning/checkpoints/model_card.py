"""The model card (README.md) of exported weights: how to load them, training settings and results."""

import json
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from dino_lightning.checkpoints.load import load_network
from dino_lightning.config import SCHEMAS
from dino_lightning.config.docs import path_keys
from dino_lightning.errors import UserError
from dino_lightning.models.frozen import FrozenNetwork

MAX_FIGURES = 60
"""Maximum number of evaluation results in a card."""
SUMMARY = {
    "knn_top1": "k-NN top-1 (%)",
    "knn_top5": "k-NN top-5 (%)",
    "epochs": "epochs",
    "steps": "optimizer steps",
    "seed": "seed",
    "commit": "commit of dino-lightning",
}
"""Key in `summary.json` -> its name in a card."""
CHECKPOINT_INDEPENDENT = ("seed", "commit")
"""Keys that are also valid for the student and for earlier checkpoints of the run."""

LOADING = {
    "timm": """
import timm
import torch

network = timm.create_model("hf-hub:OWNER/NAME", pretrained=True).eval()     # or "local-dir:FOLDER"
settings = timm.data.resolve_model_data_config(network)
transform = timm.data.create_transform(**settings, is_training=False)
with torch.no_grad():
    features = network(transform(image)[None])                               # (1, D)
""",
    "vit": """
import torch
from transformers import AutoImageProcessor, AutoModel

processor = AutoImageProcessor.from_pretrained("OWNER/NAME")
network = AutoModel.from_pretrained("OWNER/NAME", add_pooling_layer=False)   # no trained pooler
with torch.no_grad():
    tokens = network(**processor(image, return_tensors="pt")).last_hidden_state
features = tokens[:, 0]                                                      # (1, D)
""",
    "resnet": """
import torch
from transformers import AutoImageProcessor, AutoModel

processor = AutoImageProcessor.from_pretrained("OWNER/NAME")
network = AutoModel.from_pretrained("OWNER/NAME")
with torch.no_grad():
    features = network(**processor(image, return_tensors="pt")).pooler_output.flatten(1)   # (1, D)
""",
}
"""Python code for cards that loads the files and computes features of an `image`."""
REMARKS = {
    "timm": "At other image sizes, timm resamples the position embedding differently than in DINO's training; "
    "dino-lightning's `checkpoint=hf:OWNER/NAME` resamples it as in training.",
    "vit": "At other image sizes than {size} x {size} pixels, pass `interpolate_pos_encoding=True`; transformers then "
    "resamples the position embedding differently than in DINO's training, and features differ. dino-lightning's "
    "`checkpoint=hf:OWNER/NAME` resamples it as in training.",
}


def model_card(network: FrozenNetwork, *, checkpoint: str, kind: str) -> str:
    """The card as Markdown; `kind`, a key of `LOADING`, is the format of the files."""
    run = find_run_folder(checkpoint)
    settings = (_run_settings(run) or {}) if run else {}
    method = _method(settings) if settings else None
    weights = sum(tensor.numel() for tensor in network.backbone.state_dict().values())
    origin = f"with dino-lightning (method `{method}`)" if method else "elsewhere and exported by dino-lightning"
    trained = f"trained {origin}" if network.trained else "not trained"
    images = (
        f"resize the shorter side to {network.resize} pixels (bicubic), crop the center {network.size} x "
        f"{network.size}, scale to 0 to 1, subtract the mean {network.mean}, divide by {network.std}"
    )
    remark = REMARKS.get(kind, "") if hasattr(network.backbone, "pos_embed") else ""
    card = f"""---
library_name: {"timm" if kind == "timm" else "transformers"}
pipeline_tag: image-feature-extraction
tags: [dino, self-supervised-learning]
# license: choose one before you publish
---

# {network.name}

A backbone with {weights / 1e6:.2f} M weights and {network.width} features per image, {trained}.

## Use

```python
{LOADING[kind].strip()}
```

Images: {images}.

{remark.format(size=(network.description or {}).get("image_size"))}
"""
    if rows := _figures(network, run):
        table = "\n".join(f"| {name} | {value} |" for name, value in rows)
        card += f"## Results\n\n| | |\n|---|---|\n{table}\n\n"
    if settings:
        card += f"## Training\n\n```yaml\n{_public(settings)}```\n"
    return card


def find_run_folder(checkpoint: str) -> Path | None:
    """The folder of the run that wrote a checkpoint; None for other weights."""
    path = Path(checkpoint).expanduser().absolute()
    if not path.exists():  # such as `timm:NAME`
        return None
    return next((folder for folder in (path, *path.parents[:2]) if _run_settings(folder)), None)


def _run_settings(folder: Path) -> dict[str, Any] | None:
    """The configuration of a run of this package; None for other folders, in some of which is a `config.yaml`, too."""
    try:
        settings = yaml.safe_load((folder / "config.yaml").read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return None
    is_run = isinstance(settings, dict) and all(isinstance(settings.get(key), dict) for key in ("method", "backbone"))
    return settings if is_run else None


def _method(settings: dict[str, Any]) -> str | None:
    """Name of the method, by its keys."""
    keys = settings["method"].keys()
    return next((name for name, schema in SCHEMAS["method"].items() if keys == {f.name for f in fields(schema)}), None)


def _figures(network: FrozenNetwork, run: Path | None) -> list[tuple[str, str]]:
    if run is None:
        return []
    file = run / "summary.json"
    summary = json.loads(file.read_text()) if file.exists() else {}  # a run that has not ended has none
    keys = [key for key in SUMMARY if summary.get(key) is not None]
    if not _is_result(network, run):
        keys = [key for key in keys if key in CHECKPOINT_INDEPENDENT]
    rows, results = [(SUMMARY[key], f"{summary[key]}") for key in keys], {}
    for line in _results(run):
        if line.get("checkpoint_digest") == network.digest and isinstance(line.get("value"), int | float):
            results[f"{line.get('eval')}: {line.get('metric')}"] = f"{line['value']:.4g} {line.get('unit', '')}".strip()
    return rows + list(results.items())[:MAX_FIGURES]


def _is_result(network: FrozenNetwork, run: Path) -> bool:
    """Whether the network is the one that the run evaluated at its end."""
    try:
        return load_network(str(run)).digest == network.digest
    except UserError:
        return False


def _results(run: Path) -> Iterator[dict[str, Any]]:
    """Lines of `results.jsonl` in the run's folder and its sibling folders."""
    for file in sorted(run.parent.glob("*/results.jsonl")):
        for text in file.read_text().splitlines():
            try:
                line = json.loads(text)
            except ValueError:  # truncated
                continue
            if isinstance(line, dict):
                yield line


def _public(settings: dict[str, Any]) -> str:
    """The configuration as YAML without folders and accounts."""
    for key in {*path_keys(), "imports", "init_from", "logger"}:
        *groups, name = key.split(".")
        section = settings
        for group in groups:
            section = section.get(group) or {}
        section.pop(name, None)
    return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
