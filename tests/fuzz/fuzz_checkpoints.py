"""Fuzz the reading of weights: `python tests/fuzz/fuzz_checkpoints.py -max_total_time=640 -rss_limit_mb=4096`.

The first byte of an input selects a kind of file, the other bytes are the file or a part of it: the pickle inside a
`.pth` or `.ckpt`, the description of the network in a `.safetensors`, the `config.yaml` of a run. A part is packed into
a file with correct checksums; otherwise, the reader would reject nearly all mutations.
"""

# ruff: noqa: E402 - instrumented modules must be imported inside the `with` statement
import copy
import hashlib
import io
import json
import os
import shutil
import sys
import tempfile
import zipfile
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import atheris

sys.path[:0] = [str(Path(__file__).parents[1] / "helpers"), str(Path(__file__).parent)]
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from torch._weights_only_unpickler import Unpickler

with atheris.instrument_imports(include=["dino_lightning.checkpoints"]):
    from dino_lightning.checkpoints import Description, load_network
    from dino_lightning.checkpoints.run_checkpoint import CorruptCheckpointError, latest_valid, verify, write_checkpoint
    from dino_lightning.checkpoints.safe_read import read_pickle, read_safetensors

import harness
from composing import SMALL, composed
from safetensors.torch import load_file, save_file

from dino_lightning.config import ViTConfig
from dino_lightning.errors import UserError
from dino_lightning.training.run import train

FOLDER = harness.scratch("checkpoints")
RUN = FOLDER / "run"
TINY = [
    "trainer.max_steps=1",
    "trainer.max_epochs=1",
    "callbacks.knn.enabled=false",
    "callbacks.pictures.enabled=false",
    "backbone.width=16",
    "backbone.depth=1",
    "backbone.heads=2",
    "method.out_dim=8",
    "method.head_hidden_dim=8",
    "method.head_bottleneck_dim=8",
    "trainer.enable_progress_bar=false",
]


def repacked(archive: bytes, pickle: bytes) -> bytes:
    """A file of `torch.save` with its pickle replaced."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(file, "w") as new:
        for name in old.namelist():
            new.writestr(name, pickle if name.endswith("/data.pkl") else old.read(name))
    return file.getvalue()


def pickle_in(archive: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(archive)) as old:
        return old.read(next(name for name in old.namelist() if name.endswith("/data.pkl")))


ABSURD: list[Any] = [
    None,
    True,
    -1,
    0,
    1,
    2,
    7,
    10**6,
    10**9,
    2**63,
    10**400,
    0.5,
    -1.5,
    float("nan"),
    float("inf"),
    "",
    "x",
    "resnet18",
    "hf-hub:a/b",
    "vit_small_patch16_224.dino",
    "/etc/passwd",
    "a\nb",
    [],
    [1],
    [0.0],
    [float("nan")] * 3,
    [1e400] * 3,
    {},
    {"": 1},
    {"checkpoint_path": str(FOLDER / "code.pth")},
    {"pretrained_cfg": {"file": "x"}},
    {"depth": 10**7},
    {"embed_dim": 10**7},
    {"num_heads": 0},
    {"depths": [10**6] * 4},
    {"pretrained": True},
    {"img_size": 10**7},
]
"""Values that replace valid ones."""


def changed(tree: Any, part: bytes) -> Any:
    """A copy of a nested structure in which the bytes select some values and their replacements."""
    provider = atheris.FuzzedDataProvider(part)
    tree = copy.deepcopy(tree)
    for _ in range(provider.ConsumeIntInRange(1, 3)):
        node: Any = tree
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            if not keys:
                break
            key = keys[provider.ConsumeIntInRange(0, len(keys) - 1)]
            deeper = isinstance(node[key], dict | list) and len(node[key]) and provider.ConsumeProbability() < 0.9
            if deeper:
                node = node[key]
                continue
            mutation = provider.ConsumeIntInRange(0, 5)
            if mutation == 0:
                del node[key]
            elif mutation == 1 and isinstance(node, dict):
                node[provider.ConsumeUnicode(8)] = copy.deepcopy(node[key])
            elif mutation == 2:
                node[key] = provider.ConsumeInt(4)
            else:
                node[key] = copy.deepcopy(ABSURD[provider.ConsumeIntInRange(0, len(ABSURD) - 1)])
            break
    return tree


def saved(content: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


class Files:
    """The files of a small run, and files in the original's format."""

    def __init__(self) -> None:
        shutil.rmtree(RUN, ignore_errors=True)
        train(composed(*SMALL, *TINY, output_dir=RUN))
        self.checkpoint = (RUN / "checkpoints" / "last.ckpt").read_bytes()
        weights = load_file(RUN / "teacher.safetensors")
        # The original's heads have 64 features each.
        original = Description(ViTConfig(width=64, depth=1, heads=1, patch_size=8), image_size=16).build().state_dict()
        self.backbone = saved(original)
        inside = {f"module.backbone.{name}": weight for name, weight in original.items()}
        self.full = saved({"student": inside, "teacher": inside, "epoch": 3, "args": Namespace(arch="vit_small")})
        self.legacy = saved(weights, _use_new_zipfile_serialization=False)
        save_file(weights, FOLDER / "without_description.safetensors")
        self.without_description = (FOLDER / "without_description.safetensors").read_bytes()
        self.exported = (RUN / "teacher.safetensors").read_bytes()
        self.weights = weights
        self.metadata = read_safetensors(RUN / "teacher.safetensors", source="seed")[1]


def seeds(files: Files) -> Iterator[bytes]:
    """One input for each kind of file and each part."""
    parts = [
        files.checkpoint,
        saved(files.weights),
        saved({"teacher": files.weights}),
        files.legacy,
        files.exported,
        files.without_description,
        pickle_in(files.checkpoint),
        pickle_in(files.backbone),
        pickle_in(files.full),
        files.metadata["network"].encode(),
    ]
    for kind, part in enumerate(parts):
        yield bytes([kind]) + part
    resnet = {"backbone": {"name": "resnet18", "arguments": {"zero_init_last": False}, "patch_size": None}}
    yield bytes([9]) + json.dumps({**json.loads(files.metadata["network"]), **resnet}).encode()
    yield bytes([10]) + files.checkpoint
    for kind in (11, 12):
        for filler in (b"\0", b"\x55", b"\xff"):
            yield bytes([kind]) + filler * 64


def targets(files: Files) -> list[Callable[[bytes], None]]:
    """The function for each kind of input, in the order of `seeds`."""

    def raw(name: str) -> Callable[[bytes], None]:
        return lambda part: load(FOLDER / name, part)

    def with_pickle(archive: bytes, name: str) -> Callable[[bytes], None]:
        return lambda part: load(FOLDER / name, repacked(archive, part))

    def described(part: bytes) -> None:
        metadata = {"network": part.decode("utf-8", "replace")}
        save_file(files.weights, FOLDER / "described.safetensors", metadata=metadata)
        load_network(str(FOLDER / "described.safetensors"))

    def resumed(part: bytes) -> None:
        """Resume from a checkpoint: unchanged, and with a correct hash."""
        folder = FOLDER / "resume"
        for hashed in (part, part + b"\nsha256:" + hashlib.sha256(part).hexdigest().encode() + b"\n"):
            (folder / "last.ckpt").write_bytes(hashed)
            with suppress(CorruptCheckpointError):
                verify(folder / "last.ckpt")
            with suppress(UserError):
                latest_valid(folder)

    network = json.loads(files.metadata["network"])
    content = torch.load(io.BytesIO(files.checkpoint), weights_only=True)
    content = {name: content[name] for name in content if name not in ("optimizer_states", "callbacks", "loops")}
    (FOLDER / "resume").mkdir(exist_ok=True)
    return [
        raw("a.ckpt"),
        raw("a.pth"),
        raw("b.pth"),
        raw("c.pt"),
        raw("a.safetensors"),
        raw("b.safetensors"),
        with_pickle(files.checkpoint, "packed.ckpt"),
        with_pickle(files.backbone, "packed.pth"),
        with_pickle(files.full, "full.pth"),
        described,
        resumed,
        lambda part: described(json.dumps(changed(network, part)).encode()),
        lambda part: load(FOLDER / "changed.ckpt", saved(changed(content, part))),
    ]


def load(path: Path, content: bytes) -> None:
    """Read a file as a pickle and as a network."""
    path.write_bytes(content)
    if path.suffix != ".safetensors":
        read_pickle(path, source="a file")
    load_network(str(path))


def main() -> None:
    Unpickler.load = atheris.instrument_func(Unpickler.load)  # type: ignore[method-assign]
    files = Files()
    known = targets(files)
    corpus = list(seeds(files))
    write_checkpoint({"a": 1}, FOLDER / "resume" / "last-1.ckpt")
    (FOLDER / "resume" / "last-1.ckpt").unlink()
    for seed in corpus:  # all imports must happen before the guard is active
        try:
            known[seed[0]](seed[1:])
        except UserError as error:
            print(f"seed {seed[0]}: {error}"[:300], file=sys.stderr)
    findings = harness.Findings(harness.folder("checkpoints") / "findings", harness.Guard(allowed=FOLDER))
    tempfile.tempdir = str(FOLDER)

    def target(data: bytes) -> None:
        if data:
            findings.run(bytes([data[0] % len(known)]) + data[1:], lambda data: known[data[0]](data[1:]), (UserError,))

    harness.fuzz("checkpoints", corpus, target)


if __name__ == "__main__":
    main()
