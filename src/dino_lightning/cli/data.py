"""`dino data`: look at a data set before training on it.

    dino data check PATH    what the images are, which are broken or double, and a sheet of sample crops
    dino data stats PATH    mean and standard deviation of each channel, for crops.mean and crops.std

Exit status: 0, 1 where `check` found broken images, 2 for wrong settings.
"""

import argparse
import os
import sys
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from dino_lightning.cli.errors import EXPLAINED, message_for, refuse_number
from dino_lightning.cli.overrides import register_timm_networks, with_settings_for_data
from dino_lightning.cli.train import CONF
from dino_lightning.config import CropsConfig, DataConfig, register
from dino_lightning.data.sources.detect import detect_source
from dino_lightning.errors import UserError

EXAMPLES = """examples:
  dino data check /data/photos                          a folder, a list (.csv, .tsv, .txt), .zip, .tar or parquet
  dino data check /data/photos experiment=vits16_100ep  sample crops as that experiment makes them
  dino data check /data/scans data.value_range=[0,65535]
  dino data stats data=cifar10

exit status: 0, 1 where check found broken images, 2 for wrong settings"""

SHEET_IMAGES = 8
"""Images on the sheet of sample crops."""


@dataclass
class Chosen:
    """What the command line and the configuration say."""

    data: DataConfig
    crops: CropsConfig
    experiment: str
    seed: int


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    options = parse(sys.argv[1:] if argv is None else argv)
    try:
        if options.images < 1 or options.workers < 0:
            raise UserError(f"--images {options.images} --workers {options.workers}: expected at least 1 and 0")
        chosen = compose_config(options.words, kind=options.data)
        return stats(chosen, options) if options.command == "stats" else check(chosen, options)
    except EXPLAINED as error:
        print(f"dino data: {message_for(error, conf=CONF)}", file=sys.stderr)
        return 2
    except OverflowError as error:
        refuse_number(error, program="dino data")


def parse(argv: list[str]) -> argparse.Namespace:
    """The options; `words` holds the path and the overrides."""
    parser = argparse.ArgumentParser(
        prog="dino data",
        description="Look at a data set before training on it.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "command", choices=("check", "stats"), help="what is in it, or mean and deviation of its values"
    )
    parser.add_argument(
        "words", nargs="*", metavar="PATH key=value", help="the images, and overrides as for dino train"
    )
    parser.add_argument(
        "--data", metavar="KIND", help="how to read PATH: an option of `data`; default: by its contents"
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="check: folder to write to; default: dino-data-NAME")
    parser.add_argument("--images", type=int, default=10_000, metavar="N", help="stats: most images read (%(default)s)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes (all cores)")
    return parser.parse_intermixed_args(argv)


def compose_config(words: list[str], *, kind: str | None) -> Chosen:
    """The configuration of `dino train data=KIND data.path=PATH OVERRIDES`."""
    paths = [word for word in words if "=" not in word or os.path.exists(word)]
    overrides = [word for word in words if word not in paths]
    named = any(word.startswith("data=") for word in overrides)
    if len(paths) > 1 or not (paths or named or kind):
        raise UserError(f"expected one PATH and overrides such as data.channels=1, got: {' '.join(words) or 'nothing'}")
    if named and kind:
        raise UserError(f"--data {kind} and data=… say the same; leave one out")
    if not named:
        overrides.append(f"data={kind or detect_source(paths[0])}")
    register()
    register_timm_networks(overrides)
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        cfg = compose("config", overrides=with_settings_for_data(overrides))
    if paths:
        known = cfg.data.keys()  # `in` does not see keys without a value
        key = next((key for key in ("path", "name", "shards") if key in known), None)
        if key is None:
            raise UserError(f"this data has no PATH; leave out '{paths[0]}'")
        cfg.data[key] = paths[0]
    data, crops = (cast(Any, OmegaConf.to_object(cfg[group])) for group in ("data", "crops"))
    return Chosen(data, crops, cfg.experiment, cfg.seed)


def open_indexed(chosen: Chosen) -> Any:
    """The sources; refuses those that can only be read from beginning to end."""
    from dino_lightning.config.constraints import check_values
    from dino_lightning.data.decode import Decoder
    from dino_lightning.data.sources import ImageSource, open_sources  # torch loads in seconds: not needed for --help

    check_values(chosen.data, prefix="data.")
    Decoder(chosen.data)  # refuses wrong settings before the work
    sources = open_sources(chosen.data, seed=chosen.seed)
    if not isinstance(sources.train, ImageSource):
        raise UserError("dino data reads images by number, and this is a stream; local tar files are data=archive")
    return sources


def stats(chosen: Chosen, options: argparse.Namespace) -> int:
    """Print the moments of the training images."""
    from dino_lightning.data.scan import moments

    source = open_indexed(chosen).train
    count = min(options.images, len(source))
    drawn = np.random.default_rng(chosen.seed).choice(len(source), count, replace=False)
    found = moments(source, np.sort(drawn), config=chosen.data, workers=options.workers)
    if found is None:
        raise UserError(f"data: none of {count} images can be read; see dino data check")
    skipped = f", {found.unreadable:,} more cannot be read" if found.unreadable else ""
    print(f"# {found.images:,} of {len(source):,} training images, values from 0 to 1{skipped}")
    print(f"crops.mean={listed(found.mean)}")
    print(f"crops.std={listed(found.std)}")
    usual = CropsConfig()
    if chosen.data.channels == len(usual.mean):
        apart = [
            max(abs(a - b) for a, b in zip(*pair, strict=True))
            for pair in ((found.mean, usual.mean), (found.std, usual.std))
        ]
        print(
            f"# ImageNet's, the default: {listed(usual.mean)} and {listed(usual.std)}; "
            f"apart by up to {apart[0]:.3f} and {apart[1]:.3f}"
        )
    return 0


def listed(values: list[float]) -> str:
    """Numbers as an override takes them."""
    return f"[{','.join(f'{value:.4g}' for value in values)}]"


def check(chosen: Chosen, options: argparse.Namespace) -> int:
    """Scan, print what was found, write bad_images.txt and crops.png."""
    from dino_lightning.data.scan import scan
    from dino_lightning.data.scan_advice import recommendations, summary

    sources = open_indexed(chosen)
    output = options.output or Path(f"dino-data-{name_of(chosen.data)}")
    output.mkdir(parents=True, exist_ok=True)
    reasons: Counter[str] = Counter()
    scans = {}
    with open(output / "bad_images.txt", "w", errors="surrogateescape") as bad:
        for split, source in (("train", sources.train), ("val", sources.val)):
            if source is not None:
                note = partial(note_unreadable, source, bad, reasons)
                scans[split] = scan(
                    source, config=chosen.data, workers=options.workers, title=split, on_unreadable=note
                )
    if not reasons:
        (output / "bad_images.txt").unlink()
    for title, text in summary(chosen.data, chosen.crops, sources, scans):
        print_entry(title, text)
    if reasons:
        listed = "\n".join(f"{count:>9,}  {reason}" for reason, count in reasons.most_common(10))
        print_entry("broken", f"{reasons.total():,}, see {output / 'bad_images.txt'}\n{listed}")
    draw_crops(chosen, sources.train, output=output)
    settings = recommendations(chosen.data, chosen.crops, scans, bad=reasons.total())
    print("\nto set:" if settings else "\nNothing to set.")
    for setting, why in settings:
        print(f"  {setting:<32} {why}")
    return 1 if reasons else 0


def print_entry(title: str, text: str) -> None:
    """A title and its text, which may have several lines."""
    print(f"{title:<11} " + text.replace("\n", f"\n{'':<12}"))


def draw_crops(chosen: Chosen, source: Any, *, output: Path) -> None:
    """Write the sheet of sample crops, one row per image."""
    from dino_lightning.report.pictures.sheets import crop_sheet

    samples = sample_crops(chosen, source)
    if not samples:
        return
    crops = [shown(crop) for sample in samples for crop in sample]
    mean, std = (three(values) for values in display_moments(chosen))
    crop_sheet(crops, mean, std, per_row=len(samples[0])).save(output / "crops.png")
    print_entry(
        "pictures", f"{output / 'crops.png'}: the crops of {len(samples)} images (experiment={chosen.experiment})"
    )


def sample_crops(chosen: Chosen, source: Any) -> list[list[Any]]:
    """Crops (C, size, size) of `SHEET_IMAGES` readable images drawn by the seed, as training makes them."""
    from dino_lightning.data.bad_images import UNREADABLE, why_unreadable
    from dino_lightning.data.crops.backends import crop_backend
    from dino_lightning.data.decode import Decoder

    mean, std = display_moments(chosen)
    decoder = Decoder(chosen.data)
    rgb = chosen.data.channels == 3
    crops = replace(chosen.crops, mean=mean, std=std, backend="pil" if rgb else "cpu")
    backend: Any = crop_backend(crops, channels=chosen.data.channels)
    samples: list[list[Any]] = []
    # Some more than needed, for those that cannot be read.
    for index in np.random.default_rng(chosen.seed).permutation(len(source))[: 10 * SHEET_IMAGES].tolist():
        try:
            content = source.read(index)
            image = decoder.pil(content) if rgb else decoder.pixels(content)
        except UNREADABLE as error:
            why_unreadable(error)
            continue
        samples.append([view[0] for view in backend([image], [chosen.seed + index])])
        if len(samples) == SHEET_IMAGES:
            break
    return samples


def display_moments(chosen: Chosen) -> tuple[list[float], list[float]]:
    """Mean and deviation by which the sample crops are normalized and shown; any will do, if they fit the channels."""
    channels, mean, std = chosen.data.channels, chosen.crops.mean, chosen.crops.std
    return (mean, std) if len(mean) == len(std) == channels else ([0.5] * channels, [0.5] * channels)


def shown(crop: Any) -> Any:
    """The first three channels, or the first one three times."""
    return crop[:3] if len(crop) >= 3 else crop[:1].expand(3, -1, -1)


def three(values: list[float]) -> list[float]:
    """As `shown`, for numbers of channels."""
    return values[:3] if len(values) >= 3 else values[:1] * 3


def note_unreadable(source: Any, file: IO[str], reasons: Counter[str], index: int, reason: str) -> None:
    """Write an image that cannot be used to the list, and count its reason."""
    file.write(f"{source.describe(index)}\t{reason}\n")
    # "… (22 bytes not processed)" and the first bytes of a file are different each time.
    reasons[reason.split(" (")[0].split("; the file begins")[0]] += 1


def name_of(data: DataConfig) -> str:
    """A short name of the data set, for a folder."""
    where = str(getattr(data, "path", None) or getattr(data, "name", None) or type(data).__name__)
    return Path(where).expanduser().absolute().stem or "root"
