"""How start-up and the memory of loader processes grow with the number of images in a folder.

    python benchmarks/growth.py --folder DIR                                  10,000, 100,000 and 1,000,000 files
    python benchmarks/growth.py --folder DIR --entries 10000 100000 --json

Empty files in class folders are made below DIR (a minute for a million), where they stay; delete DIR afterwards. Timed
are torchvision's `ImageFolder`, our first start, the next ones (median of five) and the one after a single file was
added; the operating system has the folders in its memory each time. Then loader processes look
at every path and label, and tell how much more memory (MB) each of them has for itself than one without images has:
`own` are private pages that were written, `uss` all private pages, so with the pages of the kept list that no other
process looked at; those are part of the file cache, and exist once. Beside it stands what a Python list of (path,
label) costs, `ImageFolder.samples`.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset
from torchvision.datasets import ImageFolder

from dino_lightning.config import FolderData
from dino_lightning.data.sources import open_sources
from dino_lightning.data.sources.folder import FolderImages

MOST_CLASSES = 1000
STARTS = 5
SETTLED = 2.5
"""Seconds after which a list trusts a changed folder."""


class Listed:
    """A Python list of (path, label), as `ImageFolder` keeps it."""

    def __init__(self, samples: list[tuple[str, int]]):
        self.samples = samples

    def look(self) -> int:
        """Look at every image's path and label."""
        return sum(len(path) + label for path, label in self.samples)


class Kept:
    """Our source."""

    def __init__(self, source: FolderImages):
        self.source = source

    def look(self) -> int:
        """Look at every image's path and label."""
        labels = self.source.labels
        assert labels is not None
        return sum(len(self.source.describe(i)) + int(labels[i]) for i in range(len(self.source)))


class Memory(IterableDataset[dict[str, float]]):
    """In a loader process: its private memory (MB) after it looked at everything."""

    def __init__(self, seen: Listed | Kept | None, *, together: Barrier):
        self.seen, self.together = seen, together

    def __iter__(self) -> Iterator[dict[str, float]]:
        if self.seen is not None:
            self.seen.look()
        self.together.wait()  # all have looked
        pages = {}
        for text in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]:
            name, kilobytes, *_ = text.split()
            pages[name.rstrip(":")] = int(kilobytes) / 1000
        self.together.wait()  # none has ended before the others were measured
        yield {"own": pages["Private_Dirty"], "uss": pages["Private_Dirty"] + pages["Private_Clean"]}


def main() -> None:
    """Make the folders, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="where the files are made")
    parser.add_argument("--entries", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    options = parser.parse_args()
    torch.set_num_threads(1)
    starts, memories = [], []
    for entries in options.entries:
        images = make(options.folder / f"files_{entries}", entries=entries)
        starts.append(time_starts(images, entries=entries, cache=options.folder / f"cache_{entries}_{os.getpid()}"))
        print(line(starts[-1]), flush=True)
        for name, seen in (("list", listed), ("kept", kept)):
            measured = measure(seen(images, options.folder / f"cache_{entries}_{os.getpid()}"), options.workers)
            memories += [{"entries": entries, "what": name, **row} for row in measured]
            for row in memories[-len(measured) :]:
                print(line(row), flush=True)
    ratios = compare(starts, memories)
    print(line(ratios))
    if options.json:
        print(json.dumps({"starts": starts, "memory": memories, "ratios": ratios}))


def make(folder: Path, *, entries: int) -> Path:
    """A folder of `entries` empty files named as those of ImageNet, in up to 1000 class folders."""
    classes = min(MOST_CLASSES, entries // 10)
    if not (folder / "complete").exists():
        for label in range(classes):
            name = f"n{label:08d}"
            (folder / "images" / name).mkdir(parents=True, exist_ok=True)
            for number in range(label, entries, classes):
                os.close(os.open(folder / "images" / name / f"{name}_{number}.JPEG", os.O_CREAT | os.O_WRONLY))
        (folder / "complete").touch()
    return folder / "images"


def time_starts(images: Path, *, entries: int, cache: Path) -> dict[str, Any]:
    """Seconds of a start in each situation."""
    time.sleep(SETTLED)
    sum(len(names) for _, _, names in os.walk(images))  # so that nobody pays for bringing the folders into memory
    theirs, torchvision = timed(lambda: ImageFolder(str(images)))
    ours, first = timed(lambda: start(images, cache))
    assert [ours.describe(i) for i in range(0, entries, 997)] == [path for path, _ in theirs.samples[::997]]
    assert np.array_equal(ours.labels, theirs.targets)
    unchanged = statistics.median(timed(lambda: start(images, cache))[1] for _ in range(STARTS))
    added = images / "n00000003" / "added.JPEG"
    added.touch()
    try:
        changed, one_added = timed(lambda: start(images, cache))
    finally:
        added.unlink()
    assert len(changed) == entries + 1
    time.sleep(SETTLED)
    start(images, cache)
    seconds = {"torchvision": torchvision, "first": first, "unchanged": unchanged, "one_added": one_added}
    return {"entries": entries, **{f"{name}_s": round(value, 4) for name, value in seconds.items()}}


def start(images: Path, cache: Path) -> FolderImages:
    """Open the folder as a training does."""
    source = open_sources(FolderData(path=str(images), cache_dir=str(cache), holdout=0), seed=0).train
    assert isinstance(source, FolderImages)
    return source


def timed(what: Callable[[], Any]) -> tuple[Any, float]:
    """The result and the seconds it took."""
    begin = time.perf_counter()
    result = what()
    return result, time.perf_counter() - begin


def listed(images: Path, cache: Path) -> Listed:
    """The folder as torchvision keeps it."""
    return Listed(ImageFolder(str(images)).samples)


def kept(images: Path, cache: Path) -> Kept:
    """The folder as we keep it."""
    return Kept(start(images, cache))


def measure(seen: Listed | Kept, workers: list[int]) -> list[dict[str, Any]]:
    """Memory for the images per loader process (MB), the largest, by number of processes and how they start."""
    os.sync()  # pages of a list that was just made would count as written by whoever maps them
    rows = []
    for method in ("fork", "spawn"):
        for count in workers:
            without, with_images = (largest(what, method=method, workers=count) for what in (None, seen))
            more = {f"{name}_mb": round(with_images[name] - without[name], 1) for name in without}
            rows.append({"method": method, "workers": count, **more})
    return rows


def largest(seen: Listed | Kept | None, *, method: str, workers: int) -> dict[str, float]:
    """The largest of the processes' memories."""
    context = torch.multiprocessing.get_context(method)
    dataset = Memory(seen, together=context.Barrier(workers))
    memories = list(DataLoader(dataset, batch_size=None, num_workers=workers, multiprocessing_context=context))
    assert len(memories) == workers
    return {name: max(memory[name] for memory in memories) for name in memories[0]}


def compare(starts: list[dict[str, Any]], memories: list[dict[str, Any]]) -> dict[str, float]:
    """What can be compared between machines: of the largest folder against itself, and against the smallest one."""
    last = starts[-1]
    ratios = {f"first_to_{name}": round(last["first_s"] / last[f"{name}_s"], 1) for name in ("unchanged", "one_added")}
    ratios["torchvision_to_first"] = round(last["torchvision_s"] / last["first_s"], 2)
    ratios["torchvision_to_unchanged"] = round(last["torchvision_s"] / last["unchanged_s"], 1)
    for what in ("list", "kept"):
        for method in ("fork", "spawn"):
            rows = [row for row in memories if row["what"] == what and row["method"] == method]
            few, many = (
                max(row["own_mb"] for row in rows if row["entries"] == at["entries"]) for at in (starts[0], last)
            )
            ratios[f"own_mb_grows_{what}_{method}"] = round(many - few, 1)
    return ratios


def line(row: dict[str, Any]) -> str:
    """One row of the table."""
    return "  ".join(f"{name} {value:>9}" for name, value in row.items())


if __name__ == "__main__":
    main()
