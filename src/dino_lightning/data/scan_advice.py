"""Describes a scan of a dataset, and recommends settings for it."""

from collections import Counter

import numpy as np

from dino_lightning.config import CropsConfig, DataConfig
from dino_lightning.data.scan import ScanResult, duplicates, merge_ranges, shared_images
from dino_lightning.data.sources.base import ImageSource, Splits

HISTOGRAM_EDGES = (0, 32, 64, 96, 128, 224, 256, 384, 512, 768, 1024, 2048)
"""Shorter sides (pixels) at which the bars of the histogram start."""
BAR_LENGTH = 30
"""Characters of the longest bar."""
CACHE_FACTOR = 3
"""A cache is recommended for images with this many times `data.cache_resize`."""
MAX_VALUES = (1023, 4095, 16383, 65535)
"""Largest values of images with 10, 12, 14 and 16 bits."""

ScansBySplit = dict[str, ScanResult]
"""`train`, and `val` if it exists."""


def summary(data: DataConfig, crops: CropsConfig, sources: Splits, scans: ScansBySplit) -> list[tuple[str, str]]:
    """Titles and texts (with one or more lines) of all properties, except broken images."""
    counts = ", ".join(f"{len(scan.hashes):,} {split}" for split, scan in scans.items())
    lines = [("images", f"{counts}{f' ({sources.remark})' if sources.remark else ''}")]
    sizes = _readable_sizes(scans)
    if len(sizes):
        lines += [("sizes", _sizes(sizes)), ("aspect", _spread(sizes[:, 1] / sizes[:, 0], "{:.2f}", "width / height"))]
        small = int((sizes.min(1) < crops.global_size).sum())
        lines.append(("small", f"{_images(small, of=len(sizes))} smaller than crops.global_size={crops.global_size}"))
    kinds: Counter[str] = sum((scan.kinds for scan in scans.values()), Counter())
    lines.append(("kinds", "\n".join(f"{count:>9,}  {kind}" for kind, count in kinds.most_common(12))))
    if rotated := sum(scan.rotated for scan in scans.values()):
        applied = "applied" if data.apply_exif_rotation else "not applied"
        lines.append(("rotated", f"{_images(rotated)} with an EXIF rotation, {applied}"))
    lines.append(("duplicates", _duplicates(sources, scans)))
    if isinstance(sources.train, ImageSource) and sources.train.labels is not None:
        lines.append(("labels", _labels(sources.train.labels, sources.train.classes or [])))
    return lines


def recommendations(data: DataConfig, crops: CropsConfig, scans: ScansBySplit, *, bad: int) -> list[tuple[str, str]]:
    """Recommended settings or actions, with reasons."""
    lines = _range_advice(data, scans)
    if (channels := _common_channels(data, scans)) is not None:
        lines.append((f"data.channels={channels}", f"all images have {channels} channel{'s' * (channels != 1)}"))
    if not lines and bad > data.max_bad_share * sum(len(scan.hashes) for scan in scans.values()):
        lines.append(("data.max_bad_share=1", f"or repair the {bad:,} broken images: a training stops with so many"))
    lines += _size_advice(data, crops, scans)
    if not data.apply_exif_rotation and any(scan.rotated for scan in scans.values()):
        lines.append(("data.apply_exif_rotation=true", "to rotate photographs upright, unlike the original DINO"))
    if "val" in scans and shared_images(scans["train"], scans["val"])[0]:
        lines.append(("remove copies from val", "k-NN finds the same image in train, so its accuracy is too high"))
    return lines


def _readable_sizes(scans: ScansBySplit) -> np.ndarray:
    return np.concatenate([scan.sizes[scan.readable] for scan in scans.values()])


def _range_advice(data: DataConfig, scans: ScansBySplit) -> list[tuple[str, str]]:
    ranges = [(dtype, values) for scan in scans.values() for dtype, values in scan.value_ranges.items()]
    if data.value_range is not None or not ranges:
        return []
    dtypes = sorted({dtype for dtype, _ in ranges})
    low, high = merge_ranges([values for _, values in ranges])
    integers = not any(dtype.startswith("float") for dtype in dtypes) and low >= 0
    maximum = next((value for value in MAX_VALUES if high <= value), None)
    value_range = f"0,{maximum}" if integers and maximum else f"{low:.6g},{high:.6g}"
    why = f"there are {', '.join(dtypes)} images, with values from {low:,.6g} to {high:,.6g}"
    return [(f"data.value_range=[{value_range}]", why)]


def _size_advice(data: DataConfig, crops: CropsConfig, scans: ScansBySplit) -> list[tuple[str, str]]:
    sizes = _readable_sizes(scans)
    if not len(sizes):
        return []
    median = int(np.median(sizes.min(1)))
    if median < crops.global_size:
        size = max(median // 16, 1) * 16
        why = f"most images are smaller than crops.global_size={crops.global_size}"
        return [(f"crops.global_size={size}", f"{why} and would be enlarged; experiment=photos32 is for 32 px")]
    if data.cache == "none" and median >= CACHE_FACTOR * data.cache_resize:
        why = f"half of the images have {median:,} px or more on the shorter side: decode and shrink them only once"
        return [("data.cache=disk", why)]
    return []


def _common_channels(data: DataConfig, scans: ScansBySplit) -> int | None:
    """The number of channels of all images, if it differs from the setting. Gray from color may be intended."""
    stored = {_channels(kind) for scan in scans.values() for kind in scan.kinds}
    if len(stored) != 1 or None in stored or stored & {data.channels}:
        return None
    (channels,) = stored
    return None if channels == 3 and data.channels == 1 else channels


def _channels(kind: str) -> int | None:
    """The channels of a described kind; None if it can be read with several numbers of channels, such as RGBA."""
    words = kind.split()
    if "channel" in words or "channels" in words:
        return int(words[1])
    return 1 if words[1:] == ["gray"] else 3 if words[1:] == ["RGB"] else None


def _sizes(sizes: np.ndarray) -> str:
    """Spread and histogram of the shorter sides of images with sizes (n, 2)."""
    if (sizes == sizes[0]).all():
        return f"all {sizes[0, 1]} × {sizes[0, 0]} px"
    shorter = sizes.min(1)
    edges = HISTOGRAM_EDGES
    counts = np.bincount(np.searchsorted(edges, shorter, side="right") - 1, minlength=len(edges))
    first, last = np.flatnonzero(counts)[[0, -1]]
    lines = [_spread(shorter, "{:,.0f}", "px, the shorter side")]
    for i in range(first, last + 1):
        end = f"{edges[i + 1] - 1}" if i + 1 < len(edges) else ""
        bar = "█" * round(BAR_LENGTH * counts[i] / counts.max()) or "▏" * bool(counts[i])
        lines.append(f"{edges[i]:>5}–{end:<5} {counts[i]:>9,} {bar}".rstrip())
    return "\n".join(lines)


def _spread(values: np.ndarray, form: str, unit: str) -> str:
    numbers = " / ".join(form.format(value) for value in (values.min(), np.median(values), values.max()))
    return f"{numbers} {unit} (smallest / median / largest)"


def _duplicates(sources: Splits, scans: ScansBySplit) -> str:
    train = sources.train
    assert isinstance(train, ImageSource)
    copies, examples = duplicates(scans["train"])
    lines = [f"exact copies in train: {copies:,} of {len(train):,} images"]
    lines += [f"  {train.describe(copy)} = {train.describe(original)}" for copy, original in examples]
    if "val" in scans and sources.val is not None:
        count, examples = shared_images(scans["train"], scans["val"])
        lines.append(f"val images that are also in train: {count:,} of {len(sources.val):,}")
        lines += [f"  {sources.val.describe(query)} = {train.describe(match)}" for query, match in examples]
    return "\n".join(lines)


def _labels(labels: np.ndarray, classes: list[str]) -> str:
    counts = np.bincount(labels[labels >= 0], minlength=len(classes))
    smallest, largest = (f"{counts[i]:,} ({classes[i]})" for i in (counts.argmin(), counts.argmax()))
    text = f"{len(classes):,} classes, from {smallest} to {largest} images"
    unlabeled = int((labels < 0).sum())
    return f"{text}, and {_images(unlabeled)} without a label" if unlabeled else text


def _images(count: int, *, of: int | None = None) -> str:
    share = f" ({count / of:.1%})" if of and count else ""
    return f"{count or 'no'} image{'s' * (count != 1)}{share}" if count < 1000 else f"{count:,} images{share}"
