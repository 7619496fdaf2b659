"""Files in the formats of the original repository, with random weights."""

import argparse
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import oracles
import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from dino_lightning.checkpoints import load_network, with_fresh_weights
from dino_lightning.config import ViTConfig
from dino_lightning.errors import UserError
from dino_lightning.models.vit import OriginalViT

Weights = dict[str, Tensor]


def vit(patch: int = 16, *, width: int = 192, size: int = 64, heads: int = 3) -> Weights:
    """A ViT of two blocks with weights so large that every path affects the output."""
    config = ViTConfig(width=width, depth=2, heads=heads, patch_size=patch)
    state = OriginalViT(config, image_size=size, drop_path_rate=0.0).state_dict()
    return {name: tensor + torch.randn_like(tensor) * 0.1 for name, tensor in state.items()}


def shaken(network: nn.Module) -> nn.Module:
    """The network in eval mode, with statistics and biases unlike the initial ones."""
    for tensor in network.state_dict().values():
        if tensor.is_floating_point():
            tensor.add_(torch.rand_like(tensor) * 0.1)
    return network.eval().requires_grad_(False)


def write_full(path: Path, *, teacher: Weights, student: Weights, **more: Any) -> None:
    """Write what the original script saves after an epoch, with learning rates as NumPy scalars."""
    head = {f"head.{name}": torch.randn(4, 4) for name in ("mlp.0.weight", "last_layer.weight_g")}
    networks = {
        key: {f"backbone.{name}": tensor for name, tensor in weights.items()} | head
        for key, weights in (("student", student), ("teacher", teacher))
    }
    content = {
        "student": {f"module.{name}": tensor for name, tensor in networks["student"].items()},
        "teacher": networks["teacher"],
        "optimizer": {"state": {}, "param_groups": [{"lr": np.float64(1e-3), "weight_decay": np.float64(0.04)}]},
        "epoch": 100,
        "args": argparse.Namespace(arch="vit_tiny", patch_size=16, local_crops_scale=(0.05, 0.4), **more),
        "dino_loss": {"center": torch.zeros(1, 4)},
        "fp16_scaler": None,
    }
    torch.save(content, path)


def check_vit(network: Any, weights: Weights, *, patch: int, sizes: tuple[int, ...], heads: int = 3) -> None:
    for size in sizes:
        images = torch.randn(2, 3, size, size)
        expected, _ = oracles.vit(weights, images, patch=patch, heads=heads)
        assert expected.std() > 0.1
        torch.testing.assert_close(network.backbone(images), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("patch", "size"), [(16, 64), (8, 32)])
def test_a_published_backbone(patch: int, size: int, tmp_path: Path) -> None:
    weights = vit(patch, size=size)
    torch.save(weights, tmp_path / "dino_deitsmall16_pretrain.pth")
    network = load_network(str(tmp_path / "dino_deitsmall16_pretrain.pth"))
    check_vit(network, weights, patch=patch, sizes=(size, size + 2 * patch, size // 2))
    assert (network.name, network.trained) == ("dino_deitsmall16_pretrain", True)
    assert (network.resize, network.size, network.mean) == (256, 224, [0.485, 0.456, 0.406])
    assert not network.backbone.training
    assert network.rebuild().state_dict().keys() == weights.keys()
    assert with_fresh_weights(network, seed=0).digest != network.digest


def test_a_full_checkpoint(tmp_path: Path) -> None:
    teacher, student = vit(), vit()
    write_full(tmp_path / "checkpoint.pth", teacher=teacher, student=student)
    for key, weights in (("teacher", teacher), ("student", student)):
        network = load_network(str(tmp_path / "checkpoint.pth"), key=key)
        check_vit(network, weights, patch=16, sizes=(64, 96))
    torch.save(teacher, tmp_path / "backbone.pth")
    alone = load_network(str(tmp_path / "backbone.pth"))
    assert alone.digest == load_network(str(tmp_path / "checkpoint.pth")).digest != network.digest


def test_a_file_of_numpy_1(tmp_path: Path) -> None:
    """Published full checkpoints use the class names of NumPy 1."""
    write_full(tmp_path / "new.pth", teacher=vit(), student=vit())
    with zipfile.ZipFile(tmp_path / "new.pth") as new, zipfile.ZipFile(tmp_path / "old.pth", "w") as old:
        for entry in new.namelist():
            data = new.read(entry)
            if entry.endswith("data.pkl"):
                assert b"numpy._core.multiarray\nscalar" in data or b"numpy.core.multiarray\nscalar" in data
                data = data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
            old.writestr(entry, data)
    assert load_network(str(tmp_path / "old.pth")).digest == load_network(str(tmp_path / "new.pth")).digest


def test_the_file_format_of_old_pytorch(tmp_path: Path) -> None:
    weights = vit()
    torch.save(weights, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    check_vit(load_network(str(tmp_path / "old.pth")), weights, patch=16, sizes=(64,))


def test_arguments_give_the_number_of_heads(tmp_path: Path) -> None:
    weights = vit(width=48, heads=4)
    write_full(tmp_path / "fork.pth", teacher=weights, student=weights, num_heads=4)
    check_vit(load_network(str(tmp_path / "fork.pth")), weights, patch=16, sizes=(64,), heads=4)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.slow_after_first(1)
def test_resnets_equal_torchvisions(name: str, tmp_path: Path) -> None:
    """Files without the counters of batch norms, as older ones, and with the classifier, as some."""
    theirs = getattr(torchvision.models, name)()
    theirs(torch.randn(8, 3, 64, 64))  # in training mode: the statistics of batch norms change
    theirs.eval()
    state = {key: tensor for key, tensor in theirs.state_dict().items() if not key.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "dino_resnet50_pretrain.pth")
    network = load_network(str(tmp_path / "dino_resnet50_pretrain.pth"))
    theirs.fc = nn.Identity()
    for size in (64, 48):
        images = torch.randn(2, 3, size, size)
        features = theirs(images)
        assert features.std() > 0.01
        torch.testing.assert_close(network.backbone(images), features, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["xcit_nano_12_p16_224", "xcit_nano_12_p8_224"])
@pytest.mark.slow_after_first(1)
def test_xcit_with_the_names_of_its_repository(name: str, tmp_path: Path) -> None:
    """facebookresearch/xcit has one `qkv` in class attention, and another name for the position embedding."""
    theirs = shaken(timm.create_model(name, num_classes=0))
    state = {key.replace("pos_embed.", "pos_embeder."): tensor for key, tensor in theirs.state_dict().items()}
    for block in (0, 1):
        for kind in ("weight", "bias"):
            parts = [state.pop(f"cls_attn_blocks.{block}.attn.{part}.{kind}") for part in "qkv"]
            state[f"cls_attn_blocks.{block}.attn.qkv.{kind}"] = torch.cat(parts)
    torch.save(state, tmp_path / "dino_xcit_pretrain.pth")
    network = load_network(str(tmp_path / "dino_xcit_pretrain.pth"))
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(network.backbone(images), theirs(images))
    assert network.rebuild().state_dict().keys() == network.backbone.state_dict().keys()


def test_other_safetensors_are_detected_by_their_shapes(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    weights = vit()
    save_file(
        weights | {"head.weight": torch.zeros(10, 192)}, tmp_path / "model.safetensors", metadata={"format": "pt"}
    )
    check_vit(load_network(str(tmp_path / "model.safetensors")), weights, patch=16, sizes=(64,))


# ------------------------------------------------------------------------------------------------------ what fails


def refused(content: Any, folder: Path, *, key: str = "teacher") -> str:
    """The error message for a file with this content."""
    torch.save(content, folder / "file.pth")
    with pytest.raises(UserError) as caught:
        load_network(str(folder / "file.pth"), key=key)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_other_architectures_are_named(tmp_path: Path) -> None:
    weights = vit()
    detected = "(ViT, width 192, depth 2, 3 heads, patch size 16, trained at 64 pixels)"
    without = {name: tensor for name, tensor in weights.items() if not name.startswith("blocks.1.attn")}
    sentence = refused(without, tmp_path)
    assert (
        f"file.pth does not fit the detected architecture {detected}: missing blocks.1.attn.qkv.weight, "
        "blocks.1.attn.qkv.bias, blocks.1.attn.proj.weight and 1 more." in sentence
    )
    sentence = refused(weights | {"register_tokens": torch.zeros(1, 4, 192)}, tmp_path)
    assert f"{detected}: unexpected register_tokens." in sentence
    sentence = refused(weights | {"norm.weight": torch.zeros(64)}, tmp_path)
    assert "norm.weight has shape (64,) instead of (192,)." in sentence


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"stem.0.weight": torch.zeros(3)}, "has weight names of no known network"),
        ({"module.linear.weight": torch.zeros(3)}, "for example linear.weight. Use checkpoint=timm:NAME"),
        ({"epoch": 3}, "contains no weights"),
        ([torch.zeros(3)], "contains a list; expected a state dict"),
        ({"teacher": {"a": torch.zeros(3)}}, "checkpoint_key=student: .* contains only teacher"),
        (
            {"cls_token": torch.zeros(3)},
            "checkpoint_key=student: .* contains only one network; leave checkpoint_key=teacher",
        ),
    ],
)
def test_files_without_a_network(content: Any, sentence: str, tmp_path: Path) -> None:
    import re

    assert re.search(sentence, refused(content, tmp_path, key="student" if "student" in sentence else "teacher"))


def test_networks_that_shapes_do_not_determine(tmp_path: Path) -> None:
    assert "the number of heads of a ViT with width 48 is unknown" in refused(vit(width=48, heads=4), tmp_path)
    resnet = torchvision.models.resnet18().state_dict()
    short = {name: tensor for name, tensor in resnet.items() if not name.startswith("layer3.1")}
    assert "a ResNet with (2, 2, 1, 2) basic blocks is not supported" in refused(short, tmp_path)
    gray = vit() | {"patch_embed.proj.weight": torch.zeros(192, 1, 16, 16)}
    assert "expects images with 1 channels, but does not specify their normalization" in refused(gray, tmp_path)


class Harm:
    """A pickle that creates a file when it is loaded without checks."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_refused_and_not_run(zipped: bool, tmp_path: Path) -> None:
    content = {**vit(), "extra": Harm(tmp_path / "harmed")}
    torch.save(content, tmp_path / "bad.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        UserError, match=r"bad.pth is refused: it contains (\S+) besides weights, and loading that could"
    ):
        load_network(str(tmp_path / "bad.pth"))
    assert not (tmp_path / "harmed").exists()
    torch.load(tmp_path / "bad.pth", weights_only=False)
    assert (tmp_path / "harmed").exists()


@pytest.mark.parametrize(
    "content", [b"", b"not a checkpoint", b"\x80\x02}q\x00.", pickle.dumps({"a": 1}, protocol=2)[:-3]]
)
def test_files_that_are_not_checkpoints(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "file.pth").write_bytes(content)
    with pytest.raises(UserError, match=r"file.pth is not a valid checkpoint"):
        load_network(str(tmp_path / "file.pth"))
