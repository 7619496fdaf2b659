"""Computes the features of many images, from the configuration to the file."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np

from dino_lightning.checkpoints import load_network
from dino_lightning.config import EmbedConfig
from dino_lightning.data.decode import Decoder
from dino_lightning.data.sources import ImageSource, open_sources
from dino_lightning.errors import UserError
from dino_lightning.evaluation.checks import check_channels
from dino_lightning.evaluation.context import EvalContext, Task, launch
from dino_lightning.evaluation.embedding.checks import check_embedding, check_output, feature_spec
from dino_lightning.evaluation.embedding.inputs import ImageInput, input_source
from dino_lightning.evaluation.embedding.output import Embeddings, write_embeddings
from dino_lightning.evaluation.features.cache import BLOCK, cached_features
from dino_lightning.evaluation.features.images import center_images, class_names
from dino_lightning.models.frozen import FrozenNetwork, check_size
from dino_lightning.runtime.console import quieten_libraries
from dino_lightning.runtime.environment import check_gpus, check_variables

BATCH_PIXELS = 256 * 224**2
"""Default number of pixels per batch."""


def run_embedding(
    config: EmbedConfig,
    *,
    output: Path | None,
    inputs: Sequence[ImageInput] | None = None,
    overrides: Sequence[str] = (),
    own_threads: bool = False,
) -> Embeddings:
    """The configured features, on every rank; also written to the file `output`, unless it is None.

    `inputs` replace the images of `config.data`. With `own_threads` the number of PyTorch threads is set as configured;
    a program that calls this keeps its own.
    """
    check_embedding(config, overrides=overrides)
    check_variables()
    check_gpus(config.trainer.accelerator)
    if output is not None:
        check_output(output, config)
    quieten_libraries()
    context = launch(config.trainer)
    if own_threads:
        context.set_threads(config.cpu_threads, num_nodes=config.trainer.num_nodes)
    network = load_network(config.checkpoint, key=config.checkpoint_key, seed=config.seed)
    if inputs is not None:
        config = replace(config, data=replace(config.data, channels=network.channels))
    check_network(config, network)
    sources = open_splits(config, context) if inputs is None else {"train": input_source(inputs, network.channels)}
    network.backbone.to(context.device)
    with bad_images_folder(context, output) as folder:
        cache = Path(config.feature_cache).expanduser() if config.feature_cache else None
        task = Task(network, config.data, context, folder, seed=config.seed, cache=cache)
        embeddings = embed_splits(config, task, sources, output=output)
        if embeddings.bad:
            name, reason = next(iter(embeddings.bad.items()))
            context.say(f"{len(embeddings.bad)} images could not be read and were left out, such as {name} ({reason})")
        if output is not None:
            if context.is_main:
                write_embeddings(embeddings, output, metadata=file_metadata(config, network))
            context.fabric.barrier()
    return embeddings


def open_splits(config: EmbedConfig, context: EvalContext) -> dict[str, ImageSource]:
    """The selected splits, without held-out images. Raises `UserError` for streams and for a missing split."""
    splits = open_sources(replace(config.data, holdout=0.0), seed=config.seed)
    if not isinstance(splits.train, ImageSource):
        raise UserError(
            "data: features are stored by the index of an image, which streams do not have; use data=archive for local "
            "tar files."
        )
    if config.split == "val" and splits.val is None:
        raise UserError("split=val: there are no validation images; choose train or all.")
    for remark in (splits.remark or "").split("; "):
        # Remarks about files that are not used; nothing is held out on purpose.
        if remark and "held out" not in remark and context.show_progress:
            context.say(remark)
    sources = {"train": splits.train} | ({} if splits.val is None else {"val": splits.val})
    return {split: source for split, source in sources.items() if config.split in ("all", split)}


def check_network(config: EmbedConfig, network: FrozenNetwork) -> None:
    """Raise `UserError` if the network does not accept these images or does not have these features."""
    check_channels(network, config.data.channels)
    feature_spec(config.features, config.n_last_blocks).check(network)
    check_size(network, config.image_size or network.size, key="image_size")


@contextmanager
def bad_images_folder(context: EvalContext, output: Path | None) -> Iterator[Path]:
    """The folder for the lists of unreadable images, shared by all ranks: that of `output`, or a temporary one."""
    if output is not None:
        yield output.parent
        return
    with tempfile.TemporaryDirectory(prefix="dino-embed-") as folder:
        yield Path(context.fabric.broadcast(folder))
        context.fabric.barrier()


def embed_splits(
    config: EmbedConfig, task: Task, sources: dict[str, ImageSource], *, output: Path | None
) -> Embeddings:
    """The features of all splits, in order."""
    stem, has_splits = "dino-embed" if output is None else output.stem, len(sources) > 1
    features, positions, bad = [], {}, {}
    for split, source in sources.items():
        bad_images = task.output / f"{stem}.bad_images{f'_{split}' * has_splits}.txt"
        label = f"{split} images" if has_splits else "images"
        features_MD, indices_M = embed_source(config, task, source, label=label, bad_images=bad_images)
        features.append(features_MD)
        positions[split] = indices_M
        bad |= read_bad_images(bad_images)
        task.context.fabric.barrier()
        if task.context.is_main:  # no rank writes to the file anymore
            bad_images.with_name(f".{bad_images.name}.lock").unlink(missing_ok=True)
    names = [sources[split].describe(int(index)) for split, indices_M in positions.items() for index in indices_M]
    if not names:
        name, reason = next(iter(bad.items()))
        raise UserError(f"data: none of the images can be read ({name}: {reason}).")
    labels = [
        name for split, indices_M in positions.items() for name in class_names(sources[split], indices_M.tolist())
    ]
    return Embeddings(
        features=np.concatenate([features_MD for features_MD in features if len(features_MD)]),
        names=names,
        labels=labels if any(labels) else None,
        splits=[split for split, indices_M in positions.items() for _ in indices_M] if has_splits else None,
        bad=bad,
        output=output,
        positions=np.concatenate(list(positions.values())),
        sources=sources,
        decoder=Decoder(config.data),
    )


def embed_source(
    config: EmbedConfig, task: Task, source: ImageSource, *, label: str, bad_images: Path
) -> tuple[np.ndarray, np.ndarray]:
    """Features (M, D) float32 and indices (M,) int64 of the readable images.

    The file of unreadable images starts empty: cached blocks record theirs again.
    """
    if task.context.is_main:
        bad_images.unlink(missing_ok=True)
    task.context.fabric.barrier()
    size = {"resize": config.image_resize, "size": config.image_size}
    images = center_images(task.network, source, **size, config=config.data, bad_images=bad_images)
    spec, side = feature_spec(config.features, config.n_last_blocks), config.image_size or task.network.size
    batch_size = config.batch_size_per_device or max(1, min(BLOCK, BATCH_PIXELS // side**2))
    forward = task.context.forward(spec.of(task.network.backbone))
    features_MD, _, indices_M = cached_features(
        task, forward, images, label=label, kind=spec.cache_key, batch_size=batch_size
    )
    return features_MD.numpy(), indices_M.numpy()


def file_metadata(config: EmbedConfig, network: FrozenNetwork) -> dict[str, str]:
    """How the features were computed."""
    return {
        "checkpoint": config.checkpoint,
        "weights": network.digest,
        "features": config.features,
        "n_last_blocks": str(config.n_last_blocks),
        "image_size": str(config.image_size or network.size),
        "precision": str(config.trainer.precision),
        "dino-lightning": version("dino-lightning"),
    }


def read_bad_images(bad_images: Path) -> dict[str, str]:
    """Name -> reason of the unreadable images in a file; empty if the file does not exist."""
    try:
        lines = bad_images.read_bytes().decode("utf-8", "surrogateescape").split("\n")
    except FileNotFoundError:
        return {}
    return {name: reason for name, _, reason in (line.partition("\t") for line in lines) if name}
