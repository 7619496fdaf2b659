"""Rows: runs that cannot be resumed as requested."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import torch
from wrong_checkpoints import Hostile, weights
from wrong_files import HTML, cut, touch
from wrong_inputs import Wrong, train

Make = Callable[[Path], list[str]]
LAST = "run/checkpoints/last.ckpt"
WHOLE = "resume: no checkpoint in DIR/run/checkpoints is valid"
NONE_WHOLE = f"{WHOLE}: last.ckpt is damaged ({{}}); start a new run in another output_dir."
CHANGED = "which would change the training"
ANOTHER_GROUP = "would change the training; restore it, or start a new run in another output_dir."
BACK = "restore the value, or write the new value into DIR/run/config.yaml if you want the change."


@cache
def finished() -> Path:
    """The folder of a short run, created once."""
    folder = Path(mkdtemp())
    train(["trainer.max_steps=2"], output=folder / "run", to_the_end=True)
    return folder / "run"


def resumed(*words: str, spoil: Callable[[Path], object] = str) -> Make:
    """Copies the run, calls `spoil` with its last checkpoint, and returns these overrides."""

    def make(path: Path) -> list[str]:
        shutil.copytree(finished(), path / "run")
        for other in (path / "run" / "checkpoints").glob("*.ckpt"):
            if other.name != "last.ckpt":
                other.unlink()
        spoil(path / LAST)
        return ["resume=true", "trainer.max_steps=2", *words]

    return make


def with_content(content: Callable[[], object]) -> Callable[[Path], object]:
    """Replaces the content of a checkpoint."""
    return lambda file: torch.save(content(), file)


HOLDER = """
import sys, time
sys.path.insert(0, sys.argv[2])
from dino_lightning.runtime.run_lock import run_lock
with run_lock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


@contextmanager
def a_run_in_the_folder(path: Path) -> Iterator[None]:
    """Another process uses the folder."""
    source = Path(__file__).parents[2] / "src"
    command = [sys.executable, "-c", HOLDER, str(path / "run"), str(source)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ.copy()) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        try:
            yield
        finally:
            other.kill()


ROWS = [
    Wrong(
        "a new run in a folder that already contains a run",
        lambda path: resumed()(path)[1:],
        "output_dir=DIR/run already contains a run. Set resume=true to continue it, or choose another folder.",
    ),
    Wrong(
        "a second run in a folder while the first is active",
        lambda _: [],
        "output_dir=DIR/run is in use by an active run (process … on …); wait until it ends, or choose another folder.",
        around=a_run_in_the_folder,
    ),
    Wrong(
        "resume=true in a folder without a run",
        lambda _: ["resume=true"],
        "resume=true: output_dir=DIR/run contains no checkpoints/last.ckpt to resume from.",
    ),
    Wrong("an empty last.ckpt", resumed(spoil=touch), NONE_WHOLE.format("it is empty")),
    Wrong(
        "a truncated last.ckpt",
        resumed(spoil=cut),
        NONE_WHOLE.format("it is truncated or not a checkpoint"),
    ),
    Wrong(
        "a web page instead of last.ckpt",
        resumed(spoil=lambda file: touch(file, HTML)),
        NONE_WHOLE.format("it is truncated or not a checkpoint"),
    ),
    Wrong(
        "a last.ckpt with one changed byte",
        resumed(spoil=lambda file: touch(file, file.read_bytes().replace(b"state_dict", b"state_dirt", 1))),
        NONE_WHOLE.format("its content does not match its hash"),
    ),
    Wrong(
        "weights from elsewhere instead of last.ckpt",
        resumed(spoil=with_content(weights)),
        "DIR/run/checkpoints/last.ckpt is not a checkpoint of a run: it contains only weights, and a run cannot resume "
        "from them.",
    ),
    Wrong(
        "a last.ckpt that runs a command when unpickled",
        resumed(spoil=with_content(lambda: {"state_dict": Hostile()})),
        "DIR/run/checkpoints/last.ckpt is refused: it contains posix.system besides weights, and loading that could "
        "run code; save the weights again as a state dict of tensors.",
    ),
    Wrong(
        "another network",
        resumed("backbone.depth=3"),
        f"resume: backbone.depth was 2 and is now 3, {CHANGED}; start a new run in another output_dir.",
    ),
    Wrong(
        "a timm network instead of a built-in ViT",
        resumed("backbone=resnet50", "crops.local_size=32"),
        f"resume: DIR/run contains a run with backbone=vit_micro, and backbone=resnet50 {ANOTHER_GROUP}",
    ),
    Wrong(
        "another number of prototypes",
        resumed("method.out_dim=512"),
        f"resume: method.out_dim was … and is now 512, {CHANGED}; start a new run in another output_dir.",
    ),
    Wrong(
        "another method",
        resumed("method=byol"),
        f"resume: DIR/run contains a run with method=dino, and method=byol {ANOTHER_GROUP}",
    ),
    Wrong(
        "another optimizer",
        resumed("optim=sgd"),
        f"resume: DIR/run contains a run with optim=adamw, and optim=sgd {ANOTHER_GROUP}",
    ),
    Wrong(
        "another learning rate",
        resumed("optim.lr=0.1"),
        f"resume: optim.lr was … and is now 0.1, {CHANGED}; {BACK}",
    ),
    Wrong("another seed", resumed("seed=7"), f"resume: seed was 0 and is now 7, {CHANGED}; {BACK}"),
    Wrong(
        "another augmentation",
        resumed("crops.flip_p=0"),
        f"resume: crops.flip_p was … and is now 0.0, {CHANGED}; {BACK}",
    ),
    Wrong(
        "another total batch",
        resumed("data.batch_size_per_device=8"),
        "resume: the total batch was 4 images (1 rank with 4) and is now 8 (1 rank with 8), which would change the "
        "training; set data.batch_size_per_device and trainer.accumulate_grad_batches so that the total batch stays "
        "the same.",
    ),
    Wrong(
        "a config.yaml that is not a configuration",
        resumed(spoil=lambda file: touch(file.parents[1] / "config.yaml", b"[1, 2")),
        "resume: DIR/run/config.yaml is not the configuration of a run (…); restore it, or delete it to resume "
        "without this check.",
    ),
]
