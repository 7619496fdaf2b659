"""The README.md beside exported weights: how to load them, what they were trained on, what they reach."""

import json
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from dino_lightning.checkpoints.load import load_network
from dino_lightning.config import SCHEMAS
from dino_lightning.config.paths import PATHS
from dino_lightning.errors import UserError
from dino_lightning.models.frozen import FrozenNetwork

PRIVATE_KEYS = (*PATHS, "imports", "init_from", "logger", "output_dir")
"""Keys that a card does not repeat: they name folders and accounts."""
MAX_FIGURES = 60
"""Figures of evaluations in a card."""
SUMMARY = {
    "knn_top1": "k-NN top-1 (%)",
    "knn_top5": "k-NN top-5 (%)",
    "epochs": "epochs",
    "steps": "optimizer steps",
    "seed": "seed",
    "commit": "commit of dino-lightning",
}
"""What a card takes from `summary.json`, and in which words."""
CHECKPOINT_INDEPENDENT = ("seed", "commit")
"""What of it is as true of the student, and of weights before the end."""

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
network = AutoModel.from_pretrained("OWNER/NAME", add_pooling_layer=False)   # a pooler was not trained
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
"""Python that loads the files and makes features of an `image`, for cards."""
REMARKS = {
    "timm": "At other sizes than its own timm resamples the position embedding in another way than DINO was trained "
    "with; dino-lightning's `checkpoint=hf:OWNER/NAME` does not.",
    "vit": "At other sizes than {size} x {size} pixels pass `interpolate_pos_encoding=True`; transformers then "
    "resamples the position embedding in another way than DINO was trained with, and features differ. dino-lightning's "
    "`checkpoint=hf:OWNER/NAME` resamples as in training.",
}


def model_card(network: FrozenNetwork, *, checkpoint: str, library: str, loading: str, remark: str) -> str:
    """The card as Markdown.

    `library` is its name on the Hub, `loading` the Python that loads and uses the files, `remark` what to know of them.
    """
    run = find_run_folder(checkpoint)
    summary = _json(run / "summary.json") if run else {}
    method = _method(run)
    head = [
        "---",
        f"library_name: {library}",
        "pipeline_tag: image-feature-extraction",
        "tags: [dino, self-supervised-learning]",
        "# license: yours to choose, before you publish",
        "---",
        "",
        f"# {network.name}",
        "",
    ]
    weights = sum(tensor.numel() for tensor in network.backbone.state_dict().values())
    origin = f"by the method `{method}` of dino-lightning" if method else "elsewhere, and written by dino-lightning"
    trained = f"trained {origin}" if network.trained else "which have not been trained"
    intro = f"A backbone of {weights / 1e6:.2f} M weights that makes {network.width} features of an image, {trained}."
    prepared = (
        f"Images: the shorter side to {network.resize} pixels (bicubic), the center {network.size} x {network.size}, "
        f"values from 0 to 1, less the mean {network.mean}, divided by {network.std}."
    )
    text = [*head, intro, "", "## Use", "", "```python", loading.strip(), "```", "", prepared, "", remark, ""]
    text += _table("Results", _figures(network, run, summary))
    if run:
        text += ["## Training", "", "```yaml", _settings(run / "config.yaml").strip(), "```", ""]
    return "\n".join(text)


def find_run_folder(checkpoint: str) -> Path | None:
    """The folder of the run that a checkpoint belongs to, None for weights of another origin."""
    path = Path(checkpoint).expanduser().absolute()
    if not path.exists():  # `timm:NAME` and the like, which have nothing to do with the folder that we are in
        return None
    return next((folder for folder in (path, *path.parents[:2]) if _is_run(folder)), None)


def _is_run(folder: Path) -> bool:
    """Whether a run of ours is there: other programs have a `config.yaml`, too."""
    try:
        settings = yaml.safe_load((folder / "config.yaml").read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return False
    return isinstance(settings, dict) and all(isinstance(settings.get(key), dict) for key in ("method", "backbone"))


def _method(run: Path | None) -> str | None:
    """The method of a run, by its schema's name."""
    settings = yaml.safe_load((run / "config.yaml").read_text()).get("method", {}) if run else {}
    names = [name for name, schema in SCHEMAS["method"].items() if settings.keys() == {f.name for f in fields(schema)}]
    return names[0] if names else None


def _figures(network: FrozenNetwork, run: Path | None, summary: dict[str, Any]) -> list[tuple[str, str]]:
    known = [key for key in SUMMARY if summary.get(key) is not None]
    if run and not _is_result(network, run):
        known = [key for key in known if key in CHECKPOINT_INDEPENDENT]
    rows, found = [(SUMMARY[key], f"{summary[key]}") for key in known], {}
    for line in _results(run):
        if line.get("checkpoint_digest") == network.digest and isinstance(line.get("value"), int | float):
            found[f"{line.get('eval')}: {line.get('metric')}"] = f"{line['value']:.4g} {line.get('unit', '')}".strip()
    return rows + list(found.items())[:MAX_FIGURES]


def _is_result(network: FrozenNetwork, run: Path) -> bool:
    """Whether the network is the one that the run has evaluated at its end."""
    try:
        return load_network(str(run)).digest == network.digest
    except UserError:
        return False


def _results(run: Path | None) -> Iterator[dict[str, Any]]:
    """The lines that evaluations have written into the run's folder or one beside it."""
    for file in sorted(run.parent.glob("*/results.jsonl")) if run else ():
        for text in file.read_text().splitlines():
            try:
                line = json.loads(text)
            except ValueError:  # cut off by a kill
                continue
            if isinstance(line, dict):
                yield line


def _settings(path: Path) -> str:
    """The run's configuration without places and accounts."""
    settings = yaml.safe_load(path.read_text())
    for key in PRIVATE_KEYS:
        *groups, name = key.split(".")
        inside = settings
        for group in groups:
            inside = inside.get(group) or {}
        inside.pop(name, None)
    return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)


def _table(title: str, rows: list[tuple[str, str]]) -> list[str]:
    if not rows:
        return []
    return [f"## {title}", "", "| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows), ""]


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}
