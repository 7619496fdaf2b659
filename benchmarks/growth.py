"""Measures how startup time and memory of loader processes grow with the number of images in a folder.

    python benchmarks/growth.py --folder DIR                                  10,000, 100,000 and 1,000,000 files
    python benchmarks/growth.py --folder DIR --entries 10000 100000 --json

Creates empty files in class folders below DIR (a minute for a million files); delete DIR afterwards. Timed are
torchvision's `ImageFolder`, our first start, later starts (median of five) and a start after one file was added; the
folders are in the operating system's cache each time. Then loader processes access all paths and labels and report how
much more private memory (MB) they have than loader processes without images: `own` counts private pages that were
written, `uss` all private pages, including pages of the memory-mapped index that no other process has accessed (these
belong to the file cache and exist once). For comparison, the same is measured for a Python list of (path, label),
`ImageFolder.samples`.
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

MAX_CLASSES = 1000
STARTS = 5
SETTLE_S = 2.5
"""Time after which the index relies on the modification time of a changed folder."""


class PythonList:
    """A Python list of (path, label), as in `ImageFolder`."""

    def __init__(self, samples: list[tuple[str, int]]):
        self.samples = samples

    def access(self) -> int:
        """Access the path and label of every image."""
        return sum(len(path) + label for path, label in self.samples)


class MappedIndex:
    """Our source, whose index is memory-mapped."""

    def __init__(self, source: FolderImages):
        self.source = source

    def access(self) -> int:
        """Access the path and label of every image."""
        labels = self.source.labels
        assert labels is not None
        return sum(len(self.source.describe(i)) + int(labels[i]) for i in range(len(self.source)))


class Memory(IterableDataset[dict[str, float]]):
    """Reports the private memory (MB) of a loader process after it has accessed all paths and labels."""

    def __init__(self, images: PythonList | MappedIndex | None, *, barrier: Barrier):
        self.images, self.barrier = images, barrier

    def __iter__(self) -> Iterator[dict[str, float]]:
        if self.images is not None:
            self.images.access()
        self.barrier.wait()  # all processes have accessed their images
        pages = {}
        for text in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]:
            name, kilobytes, *_ = text.split()
            pages[name.rstrip(":")] = int(kilobytes) / 1000
        self.barrier.wait()  # no process ends before all are measured
        yield {"own": pages["Private_Dirty"], "uss": pages["Private_Dirty"] + pages["Private_Clean"]}


def main() -> None:
    """Create the folders, measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="where the files are created")
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
        for name, load in (("list", python_list), ("index", mapped_index)):
            measured = measure(load(images, options.folder / f"cache_{entries}_{os.getpid()}"), options.workers)
            memories += [{"entries": entries, "what": name, **row} for row in measured]
            for row in memories[-len(measured) :]:
                print(line(row), flush=True)
    ratios = compare(starts, memories)
    print(line(ratios))
    if options.json:
        print(json.dumps({"starts": starts, "memory": memories, "ratios": ratios}))


def make(folder: Path, *, entries: int) -> Path:
    """Create `entries` empty files named as in ImageNet, in up to 1000 class folders; returns their folder."""
    classes = min(MAX_CLASSES, entries // 10)
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
    time.sleep(SETTLE_S)
    sum(len(names) for _, _, names in os.walk(images))  # load the folders into the operating system's cache
    image_folder, torchvision = timed(lambda: ImageFolder(str(images)))
    ours, first = timed(lambda: start(images, cache))
    assert [ours.describe(i) for i in range(0, entries, 997)] == [path for path, _ in image_folder.samples[::997]]
    assert np.array_equal(ours.labels, image_folder.targets)
    unchanged = statistics.median(timed(lambda: start(images, cache))[1] for _ in range(STARTS))
    added = images / "n00000003" / "added.JPEG"
    added.touch()
    try:
        changed, one_added = timed(lambda: start(images, cache))
    finally:
        added.unlink()
    assert len(changed) == entries + 1
    time.sleep(SETTLE_S)
    start(images, cache)
    seconds = {"torchvision": torchvision, "first": first, "unchanged": unchanged, "one_added": one_added}
    return {"entries": entries, **{f"{name}_s": round(value, 4) for name, value in seconds.items()}}


def start(images: Path, cache: Path) -> FolderImages:
    """Open the folder as training does."""
    source = open_sources(FolderData(path=str(images), cache_dir=str(cache), holdout=0), seed=0).train
    assert isinstance(source, FolderImages)
    return source


def timed(run: Callable[[], Any]) -> tuple[Any, float]:
    """The result of a call and its duration in seconds."""
    begin = time.perf_counter()
    result = run()
    return result, time.perf_counter() - begin


def python_list(images: Path, cache: Path) -> PythonList:
    """The folder as torchvision loads it."""
    return PythonList(ImageFolder(str(images)).samples)


def mapped_index(images: Path, cache: Path) -> MappedIndex:
    """The folder as we load it."""
    return MappedIndex(start(images, cache))


def measure(images: PythonList | MappedIndex, workers: list[int]) -> list[dict[str, Any]]:
    """Largest memory for the images in a loader process (MB), by number of processes and start method."""
    os.sync()  # dirty pages of a new index would count as written by the processes that map them
    rows = []
    for method in ("fork", "spawn"):
        for count in workers:
            without, with_images = (largest(each, method=method, workers=count) for each in (None, images))
            more = {f"{name}_mb": round(with_images[name] - without[name], 1) for name in without}
            rows.append({"method": method, "workers": count, **more})
    return rows


def largest(images: PythonList | MappedIndex | None, *, method: str, workers: int) -> dict[str, float]:
    """The largest private memory of the loader processes."""
    context = torch.multiprocessing.get_context(method)
    dataset = Memory(images, barrier=context.Barrier(workers))
    memories = list(DataLoader(dataset, batch_size=None, num_workers=workers, multiprocessing_context=context))
    assert len(memories) == workers
    return {name: max(memory[name] for memory in memories) for name in memories[0]}


def compare(starts: list[dict[str, Any]], memories: list[dict[str, Any]]) -> dict[str, float]:
    """Figures to compare between machines: ratios for the largest folder, and its growth from the smallest one."""
    last = starts[-1]
    ratios = {f"first_to_{name}": round(last["first_s"] / last[f"{name}_s"], 1) for name in ("unchanged", "one_added")}
    ratios["torchvision_to_first"] = round(last["torchvision_s"] / last["first_s"], 2)
    ratios["torchvision_to_unchanged"] = round(last["torchvision_s"] / last["unchanged_s"], 1)
    for what in ("list", "index"):
        for method in ("fork", "spawn"):
            rows = [row for row in memories if row["what"] == what and row["method"] == method]
            few, many = (
                max(row["own_mb"] for row in rows if row["entries"] == each["entries"]) for each in (starts[0], last)
            )
            ratios[f"own_mb_grows_{what}_{method}"] = round(many - few, 1)
    return ratios


def line(row: dict[str, Any]) -> str:
    """A row of the table as text."""
    return "  ".join(f"{name} {value:>9}" for name, value in row.items())


if __name__ == "__main__":
    main()
