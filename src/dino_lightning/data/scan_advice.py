"""A scan of a data set in words: what was found, and what to set."""

from collections import Counter

import numpy as np

from dino_lightning.config import CropsConfig, DataConfig
from dino_lightning.data.scan import ScanResult, duplicates, joined, shared
from dino_lightning.data.sources.base import ImageSource, Splits

EDGES = (0, 32, 64, 96, 128, 224, 256, 384, 512, 768, 1024, 2048)
"""Shorter sides (pixels) at which a bar of the histogram begins."""
BAR = 30
"""Characters of the longest bar."""
LARGE = 3
"""Images of this many times `data.cache_resize` are worth a cache."""
DEPTHS = (1023, 4095, 16383, 65535)
"""Largest values of images of 10, 12, 14 and 16 bits."""

ScansBySplit = dict[str, ScanResult]
"""`train`, and `val` where there is one."""


def summary(data: DataConfig, crops: CropsConfig, sources: Splits, scans: ScansBySplit) -> list[tuple[str, str]]:
    """Title and text, of one line or more, of everything that is worth a line; without the broken images."""
    counts = ", ".join(f"{len(scan.hashes):,} {split}" for split, scan in scans.items())
    lines = [("images", f"{counts}{f' ({sources.remark})' if sources.remark else ''}")]
    sizes = np.concatenate([scan.sizes[scan.readable] for scan in scans.values()])
    if len(sizes):
        lines += [("sizes", _sizes(sizes)), ("aspect", _spread(sizes[:, 1] / sizes[:, 0], "{:.2f}", "width / height"))]
        small = int((sizes.min(1) < crops.global_size).sum())
        lines.append(("small", f"{_images(small, of=len(sizes))} smaller than crops.global_size={crops.global_size}"))
    kinds: Counter[str] = sum((scan.kinds for scan in scans.values()), Counter())
    lines.append(("kinds", "\n".join(f"{count:>9,}  {kind}" for kind, count in kinds.most_common(12))))
    if turned := sum(scan.turned for scan in scans.values()):
        applied = "applied" if data.apply_exif_rotation else "not applied"
        lines.append(("rotated", f"{_images(turned)} with an EXIF rotation, {applied}"))
    lines.append(("duplicates", _duplicates(sources, scans)))
    if isinstance(sources.train, ImageSource) and sources.train.labels is not None:
        lines.append(("labels", _labels(sources.train.labels, sources.train.classes or [])))
    return lines


def recommendations(data: DataConfig, crops: CropsConfig, scans: ScansBySplit, *, bad: int) -> list[tuple[str, str]]:
    """What to set or to do, and why."""
    lines = _range_advice(data, scans)
    if (channels := _wanted_channels(data, scans)) is not None:
        lines.append((f"data.channels={channels}", f"all images have {channels} channel{'s' * (channels != 1)}"))
    if not lines and bad > data.max_bad_share * sum(len(scan.hashes) for scan in scans.values()):
        lines.append(("data.max_bad_share=1", f"or mend the {bad:,} broken images: with so many a training stops"))
    lines += _size_advice(data, crops, scans)
    if not data.apply_exif_rotation and any(scan.turned for scan in scans.values()):
        lines.append(("data.apply_exif_rotation=true", "to see photographs upright, unlike the original"))
    if "val" in scans and shared(scans["train"], scans["val"])[0]:
        lines.append(("remove copies from val", "k-NN finds the same image in train, and looks better than it is"))
    return lines


def _range_advice(data: DataConfig, scans: ScansBySplit) -> list[tuple[str, str]]:
    deep: dict[str, tuple[float, float]] = {}
    for scan in scans.values():
        for name, span in scan.deep.items():
            deep[name] = joined(deep.get(name, span), span)
    if data.value_range is not None or not deep:
        return []
    low = min(span[0] for span in deep.values())
    high = max(span[1] for span in deep.values())
    whole = not any(name.startswith("float") for name in deep) and low >= 0
    depth = next((top for top in DEPTHS if high <= top), None)
    span = f"0,{depth}" if whole and depth else f"{low:.6g},{high:.6g}"
    why = f"there are images of {', '.join(sorted(deep))}; their values go from {low:,.6g} to {high:,.6g}"
    return [(f"data.value_range=[{span}]", why)]


def _size_advice(data: DataConfig, crops: CropsConfig, scans: ScansBySplit) -> list[tuple[str, str]]:
    shorter = np.concatenate([scan.sizes[scan.readable] for scan in scans.values()]).min(1)
    if not len(shorter):
        return []
    median = int(np.median(shorter))
    if median < crops.global_size:
        size = max(median // 16, 1) * 16
        why = f"most images are smaller than crops.global_size={crops.global_size}"
        return [(f"crops.global_size={size}", f"{why} and would be enlarged; experiment=photos32 is for 32 px")]
    if data.cache == "none" and median >= LARGE * data.cache_resize:
        why = f"half of the images have {median:,} px or more on the shorter side: decode and shrink them only once"
        return [("data.cache=disk", why)]
    return []


def _wanted_channels(data: DataConfig, scans: ScansBySplit) -> int | None:
    """The number that all images have, where that is another one than configured; gray of color may be on purpose."""
    stored = {_channels(kind) for scan in scans.values() for kind in scan.kinds}
    if len(stored) != 1 or None in stored or stored & {data.channels}:
        return None
    (channels,) = stored
    return None if channels == 3 and data.channels == 1 else channels


def _channels(kind: str) -> int | None:
    """Of a kind in words; None for one that can become several, such as RGBA."""
    words = kind.split()
    if "channel" in words or "channels" in words:
        return int(words[1])
    return 1 if words[1:] == ["gray"] else 3 if words[1:] == ["RGB"] else None


def _sizes(sizes: np.ndarray) -> str:
    """Spread and histogram of the shorter sides of images (n, 2)."""
    if (sizes == sizes[0]).all():
        return f"all {sizes[0, 1]} × {sizes[0, 0]} px"
    shorter = sizes.min(1)
    counts = np.bincount(np.searchsorted(EDGES, shorter, side="right") - 1, minlength=len(EDGES))
    first, last = np.flatnonzero(counts)[[0, -1]]
    rows = []
    for bar in range(first, last + 1):
        end = f"{EDGES[bar + 1] - 1}" if bar + 1 < len(EDGES) else ""
        drawn = "█" * round(BAR * counts[bar] / counts.max()) or "▏" * bool(counts[bar])
        rows.append(f"{EDGES[bar]:>5}–{end:<5} {counts[bar]:>9,} {drawn}".rstrip())
    return "\n".join([_spread(shorter, "{:,.0f}", "px, the shorter side"), *rows])


def _spread(values: np.ndarray, form: str, of_what: str) -> str:
    shown = " / ".join(form.format(value) for value in (values.min(), np.median(values), values.max()))
    return f"{shown} {of_what} (smallest / median / largest)"


def _duplicates(sources: Splits, scans: ScansBySplit) -> str:
    train = sources.train
    assert isinstance(train, ImageSource)
    copies, examples = duplicates(scans["train"])
    lines = [f"exact copies in train: {copies:,} of {len(train):,} images"]
    lines += [f"  {train.describe(one)} = {train.describe(other)}" for one, other in examples]
    if "val" in scans and sources.val is not None:
        both, examples = shared(scans["train"], scans["val"])
        lines.append(f"val images that are in train too: {both:,} of {len(sources.val):,}")
        lines += [f"  {sources.val.describe(one)} = {train.describe(other)}" for one, other in examples]
    return "\n".join(lines)


def _labels(labels: np.ndarray, classes: list[str]) -> str:
    counts = np.bincount(labels[labels >= 0], minlength=len(classes))
    fewest, most = int(counts.argmin()), int(counts.argmax())
    without = int((labels < 0).sum())
    spread = (f"{counts[label]:,} ({classes[label]})" for label in (fewest, most))
    text = f"{len(classes):,} classes, from {' to '.join(spread)} images"
    return f"{text}, and {_images(without)} without a label" if without else text


def _images(count: int, *, of: int | None = None) -> str:
    share = f" ({count / of:.1%})" if of and count else ""
    return f"{count or 'no'} image{'s' * (count != 1)}{share}" if count < 1000 else f"{count:,} images{share}"
