"""Rows: what `dino eval` is given as a checkpoint."""

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
VIT = "ViT of width 64, depth 2, 2 heads, patches of 8 pixels, trained at 224"
NOT_WHOLE = "is not a checkpoint, or not a whole one"


class Hostile:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("echo this must not run",)


def checkpoint(make: Callable[[Path], object], *words: str) -> Make:
    """`checkpoint=` what is made."""
    return lambda path: [f"checkpoint={make(path)}", *IMAGES, *words]


def evaluated(*words: str) -> Make:
    """A small network, and these words with `DIR` for the folder."""
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
    """A file of weights as a run exports it, changed."""

    def make(path: Path) -> Path:
        changed = weights()
        change(changed)
        save_file(changed, path / name, metadata={"network": json.dumps(network().description)})
        return path / name

    return make


def described(text: str) -> Callable[[Path], Path]:
    """A file of weights with this description of their network."""

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
        "a file that is not there, with one of a similar name beside it",
        checkpoint(lambda path: touch(path / "teacher.pth").with_name("techer.pth")),
        "checkpoint=DIR/techer.pth: there is no such file; did you mean 'DIR/teacher.pth'?",
    ),
    row(
        "a file of zero bytes",
        checkpoint(lambda path: touch(path / "x.pth")),
        f"checkpoint=DIR/x.pth {NOT_WHOLE}: it is empty.",
    ),
    row(
        "a web page",
        checkpoint(lambda path: touch(path / "x.pth", HTML)),
        f"checkpoint=DIR/x.pth {NOT_WHOLE}: it is a web page.",
    ),
    row(
        "an image",
        checkpoint(lambda path: touch(path / "x.pth", image())),
        f"checkpoint=DIR/x.pth {NOT_WHOLE}: PyTorch cannot read it.",
    ),
    row(
        "a .pth that is cut off",
        checkpoint(lambda path: cut(saved(weights)(path))),
        f"checkpoint=DIR/x.pth {NOT_WHOLE}: PyTorch cannot read it.",
    ),
    row(
        "a .safetensors of zero bytes",
        checkpoint(lambda path: touch(path / "x.safetensors")),
        "checkpoint=DIR/x.safetensors is not a safetensors file, or not a whole one (…).",
    ),
    row(
        "a web page saved as .safetensors",
        checkpoint(lambda path: touch(path / "x.safetensors", HTML)),
        "checkpoint=DIR/x.safetensors is not a safetensors file, or not a whole one (…).",
    ),
    row(
        "a .safetensors that is cut off",
        checkpoint(lambda path: cut(exported()(path))),
        "checkpoint=DIR/x.safetensors is not a safetensors file, or not a whole one (…).",
    ),
    row(
        "a file that runs a command when it is unpickled",
        checkpoint(saved(lambda: {"state_dict": Hostile()})),
        "checkpoint=DIR/x.pth is refused: besides weights it holds posix.system, and reading that could run code; save "
        "it anew as a state dict of tensors.",
    ),
    row(
        "the same as a plain pickle",
        checkpoint(lambda path: touch(path / "x.pth", pickle.dumps({"a": Hostile()}))),
        f"checkpoint=DIR/x.pth {NOT_WHOLE}: PyTorch cannot read it.",
    ),
    row(
        "a list of numbers",
        checkpoint(saved([1, 2])),
        "checkpoint=DIR/x.pth holds a list; expected a state dict or a checkpoint.",
    ),
    row(
        "an empty dictionary",
        checkpoint(saved({})),
        "checkpoint=DIR/x.pth holds no weights; expected a state dict of tensors, or one under 'teacher'.",
    ),
    row(
        "weights of no known network",
        checkpoint(saved(lambda: {"a": torch.zeros(3), "b": torch.ones(2)})),
        "checkpoint=DIR/x.pth belongs to no network that is known by its names (ViT, ResNet, XCiT): the first are a, "
        "b. Networks of timm load by checkpoint=timm:NAME.",
    ),
    row(
        "weights of a ConvNeXt",
        checkpoint(saved(lambda: timm.create_model("test_convnext").state_dict())),
        "checkpoint=DIR/x.pth belongs to no network that is known by its names (ViT, ResNet, XCiT): the first are …. "
        "Networks of timm load by checkpoint=timm:NAME.",
    ),
    row(
        "a weight is missing",
        checkpoint(exported(lambda changed: changed.pop("blocks.0.attn.qkv.weight"))),
        f"checkpoint=DIR/x.safetensors does not fit the architecture it was taken for, {VIT}: missing "
        "blocks.0.attn.qkv.weight.",
    ),
    row(
        "a weight too many",
        checkpoint(exported(lambda changed: changed.update(extra=torch.zeros(1)))),
        f"checkpoint=DIR/x.safetensors does not fit the architecture it was taken for, {VIT}: unexpected extra.",
    ),
    row(
        "a weight of another shape",
        checkpoint(exported(shorter)),
        f"checkpoint=DIR/x.safetensors does not fit the architecture it was taken for, {VIT}: other norm.weight of "
        "shape (5,) instead of (64,).",
    ),
    row(
        "NaN in a weight",
        checkpoint(exported(diverged)),
        "checkpoint=DIR/x.safetensors: norm.weight holds values that are NaN or infinite, as after a training that has "
        "diverged; take an earlier checkpoint.",
    ),
    row(
        "a description of the network that is cut off",
        checkpoint(described("[1")),
        "checkpoint=DIR/x.safetensors: its description of the network is not of this version (…).",
    ),
    row(
        "a description of the network without its keys",
        checkpoint(described("{}")),
        "checkpoint=DIR/x.safetensors: its description of the network is not of this version (…).",
    ),
    row(
        "a checkpoint without a teacher, for checkpoint_key=teacher",
        checkpoint(saved(of_student_alone, "last.ckpt"), "checkpoint_key=teacher"),
        "checkpoint_key=teacher: checkpoint=DIR/last.ckpt does not hold it.",
    ),
    row(
        "teacher.safetensors, for checkpoint_key=student",
        checkpoint(exported(name="teacher.safetensors"), "checkpoint_key=student"),
        "checkpoint_key=student: checkpoint=DIR/teacher.safetensors holds the teacher only; a run's "
        "checkpoints/last.ckpt holds what it has.",
    ),
    row(
        "a folder without weights",
        checkpoint(lambda path: photos(path / "in")),
        "checkpoint=DIR/in is a folder without teacher.safetensors, student.safetensors or checkpoints/last.ckpt; "
        "expected the folder of a run, or a file of weights.",
    ),
    row(
        "a network that timm does not have",
        checkpoint(lambda _: "timm:resnet5O"),
        "checkpoint=timm:resnet5O: timm … has no network 'resnet5O'; did you mean 'resnet50'?",
    ),
    row(
        "fresh weights of a network that does not exist",
        checkpoint(lambda _: "untrained:vit_smal"),
        "checkpoint=untrained:vit_smal: 'vit_smal' is no file, no file of conf/backbone and no network of timm; did "
        "you mean 'vit_small'?",
    ),
    row(
        "a network of RGB for data.channels=1",
        evaluated("data.channels=1"),
        "data.channels=1: untrained takes images of 3 channels.",
    ),
    row(
        "images without labels",
        lambda path: [f"checkpoint={SMALL}", "data=folder", f"data.path={photos(path / 'in', classes=1)}"],
        "data: the training images have no labels (no labels: 'DIR/in' has one folder only); this evaluation needs "
        "classes.",
    ),
    row(
        "a run on images of one's own, and no word about images",
        lambda path: [f"checkpoint={touch(path / 'r' / 'config.yaml', b'data: {path: photos}').parent}"],
        "checkpoint=DIR/r was trained on data.path=photos: name the images of the evaluation with data=, or take "
        "data=builtin for the built-in ones.",
    ),
    row(
        "output_dir is a file",
        lambda path: [*evaluated(f"output_dir={touch(path / 'o')}")(path)],
        "output_dir=DIR/o cannot be written ('DIR/o' is a file or lies in one); choose a folder of yours.",
    ),
    row(
        "output_dir that may not be written",
        evaluated("output_dir=DIR/o"),
        "output_dir=DIR/o cannot be written (Permission denied); choose a folder of yours.",
        around=as_nobody,
        needs_root=True,
    ),
]
