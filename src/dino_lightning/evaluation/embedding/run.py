"""From a configuration to features, in the order of the work."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np

from dino_lightning.checkpoints import load_network
from dino_lightning.config import EmbedConfig
from dino_lightning.data.decode import Decoder
from dino_lightning.data.sources import ImageSource, open_sources
from dino_lightning.errors import UserError
from dino_lightning.evaluation.context import EvalContext, Task, launched, set_threads
from dino_lightning.evaluation.embedding.checks import check_embedding, check_machine, check_output
from dino_lightning.evaluation.embedding.inputs import ImageInput, given_source
from dino_lightning.evaluation.embedding.output import write_embeddings
from dino_lightning.evaluation.embedding.result import Embeddings
from dino_lightning.evaluation.features.cache import BLOCK, cached_features
from dino_lightning.evaluation.features.choice import FeatureKind
from dino_lightning.evaluation.features.images import ViewedImages, center_view
from dino_lightning.models.frozen import FrozenNetwork, check_size
from dino_lightning.runtime.console import quieten_libraries

PIXELS = 256 * 224**2
"""Of the images of a batch, where nobody says how many."""


def run_embedding(
    config: EmbedConfig,
    *,
    output: Path | None,
    given: Sequence[ImageInput] | None = None,
    overrides: Sequence[str] = (),
    own_threads: bool = False,
) -> Embeddings:
    """The features as configured, on every rank, and in the file `output`, unless None.

    `given` replaces the images of `config.data`. With `own_threads` PyTorch gets the threads that the configuration
    says; a program that calls this keeps its own.
    """
    check_embedding(config, overrides=overrides)
    check_machine(config)
    if output is not None:
        check_output(output, config)
    quieten_libraries()
    runtime = EvalContext(launched(config.trainer), show_progress=config.trainer.enable_progress_bar)
    if own_threads:
        set_threads(runtime.fabric, config.cpu_threads, num_nodes=config.trainer.num_nodes)
    network = load_network(config.checkpoint, key=config.checkpoint_key, seed=config.seed)
    if given is not None:
        config = replace(config, data=replace(config.data, channels=network.channels))
    check_network(config, network)
    sources = open_splits(config, runtime) if given is None else {"train": given_source(given, network.channels)}
    network.backbone.to(runtime.device)
    with bad_images_folder(runtime, output) as folder:
        cache = Path(config.feature_cache).expanduser() if config.feature_cache else None
        task = Task(network, config.data, runtime, folder, seed=config.seed, cache=cache)
        found = extracted(config, task, sources, output=output)
        tell_bad(found, runtime)
        if output is not None:
            if runtime.is_main:
                write_embeddings(found, output, about=about(config, network))
            runtime.fabric.barrier()
    return found


def open_splits(config: EmbedConfig, runtime: EvalContext) -> dict[str, ImageSource]:
    """The chosen splits and their images, none held out. Raises `UserError` for streams and a split that is missing."""
    opened = open_sources(replace(config.data, holdout=0.0), seed=config.seed)
    if not isinstance(opened.train, ImageSource):
        raise UserError(
            "data: features are kept by the number of an image, which a stream does not have; local tar "
            "files are data=archive."
        )
    splits = {"train": opened.train} | ({} if opened.val is None else {"val": opened.val})
    if config.split == "val" and opened.val is None:
        raise UserError("split=val: there are no validation images; choose train or all.")
    for notice in (opened.remark or "").split("; "):
        # What lies beside the images and is not used; that nothing is held out is on purpose.
        if notice and "held out" not in notice and runtime.show_progress:
            runtime.say(notice)
    return {name: source for name, source in splits.items() if config.split in ("all", name)}


def check_network(config: EmbedConfig, network: FrozenNetwork) -> None:
    """Raise `UserError` where the network does not take these images or has no such features."""
    if network.channels != config.data.channels:
        raise UserError(
            f"data.channels={config.data.channels}: {network.name} takes images of {network.channels} channels."
        )
    FeatureKind(config.features, config.n_last_blocks).check_network(network)
    check_size(network, config.image_size or network.size, key="image_size")


@contextmanager
def bad_images_folder(runtime: EvalContext, output: Path | None) -> Iterator[Path]:
    """A folder in which loader processes of all ranks note broken images: that of `output`, or one that goes again."""
    if output is not None:
        yield output.parent
        return
    with tempfile.TemporaryDirectory(prefix="dino-embed-") as own:
        yield Path(runtime.fabric.broadcast(own))
        runtime.fabric.barrier()


def extracted(config: EmbedConfig, task: Task, sources: dict[str, ImageSource], *, output: Path | None) -> Embeddings:
    """Features of all splits, one after another."""
    stem, several = "dino-embed" if output is None else output.stem, len(sources) > 1
    parts, bad = [], {}
    for split, source in sources.items():
        path = task.output / f"{stem}.bad_images{f'_{split}' * several}.txt"
        images = viewed(config, task, source, bad_images=path)
        features_MD, positions_M = features_of(config, task, images, what=f"{split} images" if several else "images")
        parts.append(Part(split, source, features_MD, positions_M))
        bad |= named_in(path)
        forget_lock(path, task.runtime)
    if not any(len(part.positions) for part in parts):
        name, reason = next(iter(bad.items()))
        raise UserError(f"data: none of the images can be read ({name}: {reason}).")
    labels = [name for part in parts for name in part.class_names()]
    return Embeddings(
        features=np.concatenate([part.features for part in parts if len(part.features)]),
        names=[part.source.describe(int(position)) for part in parts for position in part.positions],
        labels=labels if any(labels) else None,
        splits=[part.split for part in parts for _ in part.positions] if several else None,
        bad=bad,
        output=output,
        positions=np.concatenate([part.positions for part in parts]),
        sources=sources,
        decoder=Decoder(config.data),
    )


@dataclass(frozen=True)
class Part:
    """What a split gave."""

    split: str
    source: ImageSource
    features: np.ndarray
    """(M, D) float32 of the readable images."""
    positions: np.ndarray
    """(M,) int64."""

    def class_names(self) -> list[str | None]:
        """Of each row; None where its class is not known."""
        classes, labels = self.source.classes, self.source.labels
        if classes is None or labels is None:
            return [None] * len(self.positions)
        return [classes[label] if label >= 0 else None for label in labels[self.positions]]


def viewed(config: EmbedConfig, task: Task, source: ImageSource, *, bad_images: Path) -> ViewedImages:
    """The center of each image. The file of broken ones begins anew: kept blocks name theirs once more."""
    if task.runtime.is_main:
        bad_images.unlink(missing_ok=True)
    task.runtime.fabric.barrier()
    size = config.image_size or task.network.size
    view = center_view(task.network, resize=config.image_resize, size=config.image_size)
    blank = (task.network.channels, size, size)
    return ViewedImages(source, view, blank=blank, config=config.data, bad_images=bad_images)


def features_of(config: EmbedConfig, task: Task, images: ViewedImages, *, what: str) -> tuple[np.ndarray, np.ndarray]:
    """Features (M, D) float32 and positions (M,) int64 of the readable images; `what` stands beside the bar."""
    kind, size = FeatureKind(config.features, config.n_last_blocks), config.image_size or task.network.size
    features_MD, _, positions_M = cached_features(
        task,
        task.runtime.forward(kind.of(task.network.backbone)),
        images,
        what=what,
        kind=kind.name,
        batch_size=config.batch_size_per_device or max(1, min(BLOCK, PIXELS // size**2)),
    )
    return features_MD.numpy(), positions_M.numpy()


def about(config: EmbedConfig, network: FrozenNetwork) -> dict[str, str]:
    """What made the features, for whoever finds the file."""
    return {
        "checkpoint": config.checkpoint,
        "weights": network.digest,
        "features": config.features,
        "n_last_blocks": str(config.n_last_blocks),
        "image_size": str(config.image_size or network.size),
        "precision": str(config.trainer.precision),
        "dino-lightning": version("dino-lightning"),
    }


def tell_bad(found: Embeddings, runtime: EvalContext) -> None:
    """Say how many images were left out."""
    if found.bad:
        name, reason = next(iter(found.bad.items()))
        runtime.say(f"{len(found.bad)} images could not be read and were left out, such as {name} ({reason})")


def forget_lock(bad_images: Path, runtime: EvalContext) -> None:
    """Nobody notes broken images any more."""
    runtime.fabric.barrier()
    if runtime.is_main:
        bad_images.with_name(f".{bad_images.name}.lock").unlink(missing_ok=True)


def named_in(bad_images: Path) -> dict[str, str]:
    """Name -> reason of the broken images that a file names, which need not be there."""
    try:
        lines = bad_images.read_bytes().decode("utf-8", "surrogateescape").split("\n")
    except FileNotFoundError:
        return {}
    return {name: reason for name, _, reason in (line.partition("\t") for line in lines) if name}
