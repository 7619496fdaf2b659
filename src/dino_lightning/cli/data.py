"""Inspect a data set before training on it.

usage: dino data [check|stats] PATH [key=value] [group=option] [group.key=value]

check (default): what the images are, which are broken or duplicates, a sheet of sample crops. stats: mean and
standard deviation of each channel, for crops.mean and crops.std. PATH: a folder, a list (.csv, .tsv, .txt),
.zip, .tar or parquet. Other words are keys and groups of dino train. Exit status: 0, 1 if check found broken
images, 2 for wrong settings.

Examples:
  dino data ~/photos
  dino data ~/photos experiment=vits16_100ep       sample crops of that experiment
  dino data check scans data.value_range=[0,65535]
  dino data stats data=cifar10
"""

import os
from collections import Counter
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
from omegaconf import OmegaConf

from dino_lightning.cli.errors import as_user_errors
from dino_lightning.cli.options import parse_options
from dino_lightning.cli.overrides import quote_overrides, register_timm_networks, with_photo_experiment
from dino_lightning.cli.program import compose_root
from dino_lightning.config import CropsConfig, DataConfig
from dino_lightning.data.sources.detect import detect_source
from dino_lightning.errors import UserError

COMMANDS = ("check", "stats")

SHEET_IMAGES = 8
"""Images on the sheet of sample crops."""


@dataclass
class Settings:
    """The part of a training configuration that is inspected."""

    data: DataConfig
    crops: CropsConfig
    experiment: str
    seed: int


@dataclass
class Options:
    """Keys of `dino data` besides those of `dino train`."""

    output: Path | None = None
    """check: folder of the results; default: dino-data-NAME."""
    images: int = 10_000
    """stats: maximum number of images to read."""
    workers: int = os.cpu_count() or 1
    """Number of processes; default: one for each core."""


def main(words: list[str]) -> int:
    """Inspect the data; returns the exit status."""
    command, words = (words[0], words[1:]) if words[:1] and words[0] in COMMANDS else ("check", words)
    keys = tuple(f"{field.name}=" for field in fields(Options))
    options = parse_options(Options, [word for word in words if word.startswith((*keys, "-"))], program="dino data")
    if options.images < 1 or options.workers < 0:
        raise UserError(f"images={options.images} workers={options.workers}: expected at least 1 and 0")
    with as_user_errors():
        settings = compose_settings([word for word in words if not word.startswith(keys)])
        return stats(settings, options) if command == "stats" else check(settings, options)


def compose_settings(words: list[str]) -> Settings:
    """The configuration of `dino train data=KIND data.path=PATH OVERRIDES`."""
    paths = [word for word in words if "=" not in word or os.path.exists(word)]
    overrides = [word for word in words if word not in paths]
    has_kind = any(word.startswith("data=") for word in overrides)
    if len(paths) > 1 or not (paths or has_kind):
        raise UserError(f"expected one PATH and settings such as data.channels=1, got: {' '.join(words) or 'nothing'}")
    if not has_kind:
        overrides.append(f"data={detect_source(paths[0])}")
    register_timm_networks(overrides)
    cfg = compose_root("config", with_photo_experiment(quote_overrides(overrides)))
    if paths:
        known = cfg.data.keys()  # `in cfg.data` skips keys without a value
        key = next((key for key in ("path", "name", "shards") if key in known), None)
        if key is None:
            raise UserError(f"this data has no PATH; leave out '{paths[0]}'")
        cfg.data[key] = paths[0]
    data, crops = (cast(Any, OmegaConf.to_object(cfg[group])) for group in ("data", "crops"))
    return Settings(data, crops, cfg.experiment, cfg.seed)


def open_indexed(settings: Settings) -> Any:
    """The sources. Raises `UserError` for a stream, which can only be read from beginning to end."""
    from dino_lightning.config.constraints import check_values
    from dino_lightning.data.decode import Decoder
    from dino_lightning.data.sources import ImageSource, open_sources  # torch takes seconds to import

    check_values(settings.data, prefix="data.")
    Decoder(settings.data)  # raises UserError for wrong settings
    sources = open_sources(settings.data, seed=settings.seed)
    if not isinstance(sources.train, ImageSource):
        raise UserError("dino data needs random access, and this is a stream; for local tar files use data=archive")
    return sources


def stats(settings: Settings, options: Options) -> int:
    """Print mean and standard deviation of the training images."""
    from dino_lightning.data.scan import moments

    source = open_indexed(settings).train
    count = min(options.images, len(source))
    drawn = np.random.default_rng(settings.seed).choice(len(source), count, replace=False)
    result = moments(source, np.sort(drawn), config=settings.data, workers=options.workers)
    if result is None:
        raise UserError(f"data: none of {count} images can be read; see dino data check")
    skipped = f", {result.unreadable:,} more cannot be read" if result.unreadable else ""
    print(f"# {result.images:,} of {len(source):,} training images, values from 0 to 1{skipped}")
    print(f"crops.mean={override_value(result.mean)}")
    print(f"crops.std={override_value(result.std)}")
    default = CropsConfig()
    if settings.data.channels == len(default.mean):
        pairs = ((result.mean, default.mean), (result.std, default.std))
        differences = [max(map(abs, np.subtract(*pair))) for pair in pairs]
        print(
            f"# ImageNet's, the default: {override_value(default.mean)} and {override_value(default.std)}; "
            f"differences of up to {differences[0]:.3f} and {differences[1]:.3f}"
        )
    return 0


def override_value(values: list[float]) -> str:
    """Numbers as the value of an override."""
    return f"[{','.join(f'{value:.4g}' for value in values)}]"


def check(settings: Settings, options: Options) -> int:
    """Scan the images, print the results, write bad_images.txt and crops.png."""
    from dino_lightning.data.scan import scan
    from dino_lightning.data.scan_advice import recommendations, summary

    sources = open_indexed(settings)
    output = options.output or Path(f"dino-data-{name_of(settings.data)}")
    output.mkdir(parents=True, exist_ok=True)
    reasons: Counter[str] = Counter()
    scans = {}
    with open(output / "bad_images.txt", "w", errors="surrogateescape") as bad:
        for split, source in (("train", sources.train), ("val", sources.val)):
            if source is not None:
                note = partial(note_unreadable, source, bad, reasons)
                scans[split] = scan(
                    source, config=settings.data, workers=options.workers, title=split, on_unreadable=note
                )
    if not reasons:
        (output / "bad_images.txt").unlink()
    for title, text in summary(settings.data, settings.crops, sources, scans):
        print_entry(title, text)
    if reasons:
        counts = "\n".join(f"{count:>9,}  {reason}" for reason, count in reasons.most_common(10))
        print_entry("broken", f"{reasons.total():,}, see {output / 'bad_images.txt'}\n{counts}")
    draw_crops(settings, sources.train, output=output)
    advice = recommendations(settings.data, settings.crops, scans, bad=reasons.total())
    print("\nto set:" if advice else "\nNothing to set.")
    for setting, why in advice:
        print(f"  {setting:<32} {why}")
    return 1 if reasons else 0


def print_entry(title: str, text: str) -> None:
    """A title and its text, which may have several lines."""
    print(f"{title:<11} " + text.replace("\n", f"\n{'':<12}"))


def draw_crops(settings: Settings, source: Any, *, output: Path) -> None:
    """Write the sheet of sample crops, one row per image."""
    from dino_lightning.report.pictures.sheets import crop_sheet

    samples = sample_crops(settings, source)
    if not samples:
        return
    shown = [0, 1, 2] if settings.data.channels >= 3 else [0, 0, 0]  # channels that become red, green and blue
    crops = [crop[shown] for sample in samples for crop in sample]
    mean, std = ([values[channel] for channel in shown] for values in display_moments(settings))
    crop_sheet(crops, mean, std, per_row=len(samples[0])).save(output / "crops.png")
    print_entry(
        "pictures", f"{output / 'crops.png'}: the crops of {len(samples)} images (experiment={settings.experiment})"
    )


def sample_crops(settings: Settings, source: Any) -> list[list[Any]]:
    """Crops (C, size, size) of `SHEET_IMAGES` readable images drawn by the seed, as training makes them."""
    from dino_lightning.data.bad_images import UNREADABLE, why_unreadable
    from dino_lightning.data.crops.backends import crop_backend
    from dino_lightning.data.decode import Decoder

    mean, std = display_moments(settings)
    decoder = Decoder(settings.data)
    rgb = settings.data.channels == 3
    crops = replace(settings.crops, mean=mean, std=std, backend="pil" if rgb else "cpu")
    backend: Any = crop_backend(crops, channels=settings.data.channels)
    samples: list[list[Any]] = []
    # More than needed, because some may be unreadable.
    for index in np.random.default_rng(settings.seed).permutation(len(source))[: 10 * SHEET_IMAGES].tolist():
        try:
            content = source.read(index)
            image = decoder.pil(content) if rgb else decoder.pixels(content)
        except UNREADABLE as error:
            why_unreadable(error)
            continue
        samples.append([view[0] for view in backend([image], [settings.seed + index])])
        if len(samples) == SHEET_IMAGES:
            break
    return samples


def display_moments(settings: Settings) -> tuple[list[float], list[float]]:
    """Mean and standard deviation to normalize and draw the sample crops with; any values do that fit the channels."""
    channels, mean, std = settings.data.channels, settings.crops.mean, settings.crops.std
    return (mean, std) if len(mean) == len(std) == channels else ([0.5] * channels, [0.5] * channels)


def note_unreadable(source: Any, file: IO[str], reasons: Counter[str], index: int, reason: str) -> None:
    """Write an image that cannot be used to the list, and count its reason."""
    file.write(f"{source.describe(index)}\t{reason}\n")
    # "… (22 bytes not processed)" and the first bytes of a file are different each time.
    reasons[reason.split(" (")[0].split("; the file begins")[0]] += 1


def name_of(data: DataConfig) -> str:
    """A short name of the data set, for a folder."""
    where = str(getattr(data, "path", None) or getattr(data, "name", None) or type(data).__name__)
    return Path(where).expanduser().absolute().stem or "root"
