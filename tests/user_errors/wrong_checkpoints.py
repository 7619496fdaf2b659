"""Rows: values of `checkpoint` for `dino eval`."""

import json
import os
import pickle
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor
from wrong_files import HTML, cut, image, photos, touch
from wrong_images import as_nobody
from wrong_inputs import EVALUATE, Wrong

from dino_lightning.checkpoints import load_network
from dino_lightning.models.frozen import FrozenNetwork

Make = Callable[[Path], list[str]]
IMAGES = ["data.train_images=16", "data.val_images=8", "eval.k=[5]"]
SMALL = "untrained:vit_micro"


class Hostile:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("echo this must not run",)


def checkpoint(make: Callable[[Path], object], *words: str) -> Make:
    """`checkpoint=` with the path that `make` returns."""
    return lambda path: [f"checkpoint={make(path)}", *IMAGES, *words]


def evaluated(*words: str) -> Make:
    """A small network, and these overrides, in which `DIR` is the folder."""
    return lambda path: [f"checkpoint={SMALL}", *IMAGES, *(word.replace("DIR", str(path)) for word in words)]


@cache
def network() -> FrozenNetwork:
    return load_network(SMALL)


def weights() -> dict[str, Tensor]:
    return {name: weight.clone() for name, weight in network().backbone.state_dict().items()}


def saved(content: Any, name: str = "x.pth") -> Callable[[Path], Path]:
    """A file of `torch.save`."""

    def make(path: Path) -> Path:
        torch.save(content() if callable(content) else content, path / name)
        return path / name

    return make


def exported(
    change: Callable[[dict[str, Tensor]], object] = dict, *, name: str = "x.safetensors"
) -> Callable[[Path], Path]:
    """A weight file like those that a run exports, with changes."""

    def make(path: Path) -> Path:
        changed = weights()
        change(changed)
        save_file(changed, path / name, metadata={"network": json.dumps(network().description)})
        return path / name

    return make


def described(text: str) -> Callable[[Path], Path]:
    """A weight file with this description of its network."""

    def make(path: Path) -> Path:
        save_file(weights(), path / "x.safetensors", metadata={"network": text})
        return path / "x.safetensors"

    return make


def of_student_alone() -> dict[str, Any]:
    return {"state_dict": {f"student.backbone.{name}": weight for name, weight in weights().items()}}


def shorter(changed: dict[str, Tensor]) -> None:
    changed["norm.weight"] = torch.zeros(5)


def diverged(changed: dict[str, Tensor]) -> None:
    changed["norm.weight"][3] = torch.nan


def row(name: str, make: Make, sentence: str, **options: Any) -> Wrong:
    return Wrong(name, make, sentence, program=EVALUATE, **options)


ROWS = [
    row(
        "a file that does not exist, next to one with a similar name",
        checkpoint(lambda path: touch(path / "teacher.pth").with_name("techer.pth")),
        "checkpoint=DIR/techer.pth: this file does not exist; did you mean 'DIR/teacher.pth'?",
    ),
    row(
        "an empty file",
        checkpoint(lambda path: touch(path / "x.pth")),
        "checkpoint=DIR/x.pth is not a valid checkpoint: it is empty.",
    ),
    row(
        "a web page",
        checkpoint(lambda path: touch(path / "x.pth", HTML)),
        "checkpoint=DIR/x.pth is not a valid checkpoint: it is a web page.",
    ),
    row(
        "an image",
        checkpoint(lambda path: touch(path / "x.pth", image())),
        "checkpoint=DIR/x.pth is not a valid checkpoint: PyTorch cannot read it.",
    ),
    row(
        "a truncated .pth",
        checkpoint(lambda path: cut(saved(weights)(path))),
        "checkpoint=DIR/x.pth is not a valid checkpoint: PyTorch cannot read it.",
    ),
    row(
        "an empty .safetensors",
        checkpoint(lambda path: touch(path / "x.safetensors")),
        "checkpoint=DIR/x.safetensors is not a valid safetensors file (…).",
    ),
    row(
        "a web page saved as .safetensors",
        checkpoint(lambda path: touch(path / "x.safetensors", HTML)),
        "checkpoint=DIR/x.safetensors is not a valid safetensors file (…).",
    ),
    row(
        "a truncated .safetensors",
        checkpoint(lambda path: cut(exported()(path))),
        "checkpoint=DIR/x.safetensors is not a valid safetensors file (…).",
    ),
    row(
        "a file that runs a command when unpickled",
        checkpoint(saved(lambda: {"state_dict": Hostile()})),
        "checkpoint=DIR/x.pth is refused: it contains posix.system besides weights, and loading that could run "
        "code; save the weights again as a state dict of tensors.",
    ),
    row(
        "the same as a plain pickle",
        checkpoint(lambda path: touch(path / "x.pth", pickle.dumps({"a": Hostile()}))),
        "checkpoint=DIR/x.pth is not a valid checkpoint: PyTorch cannot read it.",
    ),
    row(
        "a list of numbers",
        checkpoint(saved([1, 2])),
        "checkpoint=DIR/x.pth contains a list; expected a state dict or a checkpoint.",
    ),
    row(
        "an empty dictionary",
        checkpoint(saved({})),
        "checkpoint=DIR/x.pth contains no weights; expected a state dict of tensors, or one under the key 'teacher'.",
    ),
    row(
        "weights of an unknown network",
        checkpoint(saved(lambda: {"a": torch.zeros(3), "b": torch.ones(2)})),
        "checkpoint=DIR/x.pth has weight names of no known network (ViT, ResNet, XCiT), for example a, b. Use "
        "checkpoint=timm:NAME for timm networks.",
    ),
    row(
        "weights of a ConvNeXt",
        checkpoint(saved(lambda: timm.create_model("test_convnext").state_dict())),
        "checkpoint=DIR/x.pth has weight names of no known network (ViT, ResNet, XCiT), for example …. Use "
        "checkpoint=timm:NAME for timm networks.",
    ),
    row(
        "a missing weight",
        checkpoint(exported(lambda changed: changed.pop("blocks.0.attn.qkv.weight"))),
        "checkpoint=DIR/x.safetensors does not fit the detected architecture (ViT, width 64, depth 2, 2 heads, "
        "patch size 8, trained at 224 pixels): missing blocks.0.attn.qkv.weight.",
    ),
    row(
        "an additional weight",
        checkpoint(exported(lambda changed: changed.update(extra=torch.zeros(1)))),
        "checkpoint=DIR/x.safetensors does not fit the detected architecture (ViT, width 64, depth 2, 2 heads, "
        "patch size 8, trained at 224 pixels): unexpected extra.",
    ),
    row(
        "a weight with another shape",
        checkpoint(exported(shorter)),
        "checkpoint=DIR/x.safetensors does not fit the detected architecture (ViT, width 64, depth 2, 2 heads, "
        "patch size 8, trained at 224 pixels): norm.weight has shape (5,) instead of (64,).",
    ),
    row(
        "a weight with NaN",
        checkpoint(exported(diverged)),
        "checkpoint=DIR/x.safetensors: norm.weight contains NaN or infinite values, probably because the training "
        "diverged; use an earlier checkpoint.",
    ),
    row(
        "a truncated description of the network",
        checkpoint(described("[1")),
        "checkpoint=DIR/x.safetensors: this version cannot read its description of the network (…).",
    ),
    row(
        "a description of the network without its keys",
        checkpoint(described("{}")),
        "checkpoint=DIR/x.safetensors: this version cannot read its description of the network (…).",
    ),
    row(
        "a checkpoint without a teacher, with checkpoint_key=teacher",
        checkpoint(saved(of_student_alone, "last.ckpt"), "checkpoint_key=teacher"),
        "checkpoint_key=teacher: checkpoint=DIR/last.ckpt does not contain a teacher.",
    ),
    row(
        "teacher.safetensors, with checkpoint_key=student",
        checkpoint(exported(name="teacher.safetensors"), "checkpoint_key=student"),
        "checkpoint_key=student: checkpoint=DIR/teacher.safetensors contains only the teacher; use the run's "
        "checkpoints/last.ckpt.",
    ),
    row(
        "a folder without weights",
        checkpoint(lambda path: photos(path / "in")),
        "checkpoint=DIR/in is a folder without teacher.safetensors, student.safetensors or checkpoints/last.ckpt; "
        "expected the folder of a run or a file with weights.",
    ),
    row(
        "an unknown timm network",
        checkpoint(lambda _: "timm:resnet5O"),
        "checkpoint=timm:resnet5O: timm … has no network 'resnet5O'; did you mean 'resnet50'?",
    ),
    row(
        "an untrained network that does not exist",
        checkpoint(lambda _: "untrained:vit_smal"),
        "checkpoint=untrained:vit_smal: 'vit_smal' is neither a file, nor a file in conf/backbone, nor a timm "
        "network; did you mean 'vit_small'?",
    ),
    row(
        "an RGB network with data.channels=1",
        evaluated("data.channels=1"),
        "data.channels=1: the network untrained expects images with 3 channels.",
    ),
    row(
        "unlabeled images",
        lambda path: [f"checkpoint={SMALL}", "data=folder", f"data.path={photos(path / 'in', classes=1)}"],
        "data: the training images have no labels (no labels: 'DIR/in' has only one class folder); this "
        "evaluation needs labels.",
    ),
    row(
        "a run trained on your own images, without data=",
        lambda path: [f"checkpoint={touch(path / 'r' / 'config.yaml', b'data: {path: photos}').parent}"],
        "checkpoint=DIR/r was trained on data.path=photos; choose the images for the evaluation with data=, or "
        "use data=builtin for the built-in images.",
    ),
    row(
        "output_dir is a file",
        lambda path: [*evaluated(f"output_dir={touch(path / 'o')}")(path)],
        "output_dir=DIR/o cannot be written ('DIR/o' is a file or inside a file); choose a folder that you can "
        "write to.",
    ),
    row(
        "output_dir without write permission",
        evaluated("output_dir=DIR/o"),
        "output_dir=DIR/o cannot be written (Permission denied); choose a folder that you can write to.",
        around=as_nobody,
        needs_root=True,
    ),
]
