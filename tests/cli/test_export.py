"""`dino export`: the library of each format reads the exported network."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from network_cases import FOLDERS_OF_TIMM, PREPROCESSING, RESNET, TINY, exported
from PIL import Image
from slow_params import first
from torch import Tensor, nn

from dino_lightning.checkpoints import load_network
from dino_lightning.cli.main import main
from dino_lightning.config import BackboneConfig, TimmConfig, ViTConfig
from dino_lightning.config.commands import FORMATS
from dino_lightning.evaluation.features.images import center_view
from dino_lightning.models.vit import OriginalViT

REGISTERS = ViTConfig(width=64, depth=1, heads=1, patch_size=8, registers=2)


def write(checkpoint: Path, output: Path, *words: str, format: str) -> None:
    assert main(["export", f"checkpoint={checkpoint}", f"output={output}", f"format={format}", *words]) == 0


def images(count: int, height: int, width: int | None = None) -> Tensor:
    return torch.randn(count, 3, height, width or height, generator=torch.Generator().manual_seed(5))


def check_close(ours: Tensor, theirs: Tensor, *, tolerance: float = 1e-5) -> None:
    """Equal up to the order of summation, which differs between kernels: about 1e-6 of values near 1."""
    assert ours.std() > 0.1
    torch.testing.assert_close(theirs, ours, rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------------------------------------------ graphs


def onnx_reader(path: Path) -> Any:
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda batch: torch.from_numpy(session.run(["features"], {"images": batch.numpy()})[0])


def program_reader(path: Path) -> Any:
    return torch.export.load(path).module()


READERS: dict[str, Any] = {".onnx": onnx_reader, ".pt2": program_reader}


@pytest.fixture(scope="module", autouse=True)
def _no_traces() -> Iterator[None]:
    """Keep pytest from capturing the exporters' debug messages, which takes longer than the exports."""
    logger = logging.getLogger("torch.__trace")
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)


@pytest.mark.parametrize(
    ("config", "format", "ending"),
    first(
        [
            (TINY, "onnx", ".onnx"),
            (TINY, "torch", ".pt2"),
            (REGISTERS, "onnx", ".onnx"),
            (REGISTERS, "torch", ".pt2"),
            (RESNET, "onnx", ".onnx"),
            (RESNET, "torch", ".pt2"),
        ],
    ),
)
@pytest.mark.slow
def test_graphs_take_images_of_any_number_and_size(
    config: BackboneConfig, format: str, ending: str, tmp_path: Path
) -> None:
    """Also for the size of the position embedding, a smaller and a larger one, and images that are not square.

    The exported graph computes the positions of the interpolation in another order, which changes features by 2e-5.
    """
    if format == "onnx":
        pytest.importorskip("onnxscript")
    if isinstance(config, TimmConfig):
        exported(tmp_path, config, image_size=64)
    else:
        exported(tmp_path, config)
    write(tmp_path / "weights.safetensors", tmp_path / f"backbone{ending}", format=format)
    backbone = load_network(str(tmp_path / "weights.safetensors")).backbone
    read = READERS[ending](tmp_path / f"backbone{ending}")
    for count, height, width in ((1, 32, 32), (4, 72, 40), (2, 16, 136), (3, 96, 64)):
        batch = images(count, height, width)
        if isinstance(config, ViTConfig) or min(height, width) >= 64:
            check_close(backbone(batch), read(batch), tolerance=1e-4)


@pytest.fixture(scope="module", params=first(["torch", "onnx"]))
def graph_of_one_size(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A graph for images of 48 x 48 pixels, with its `weights.safetensors` in the same folder."""
    if request.param == "onnx":
        pytest.importorskip("onnxscript")
    folder = tmp_path_factory.mktemp("graph")
    path = folder / f"backbone{FORMATS[request.param]}"
    write(exported(folder), path, "image_size=48", format=request.param)
    return path


@pytest.mark.slow
def test_graphs_of_one_size_take_any_number_of_images(graph_of_one_size: Path) -> None:
    backbone = load_network(str(graph_of_one_size.parent / "weights.safetensors")).backbone
    read = READERS[graph_of_one_size.suffix](graph_of_one_size)
    for count in (1, 5):
        check_close(backbone(images(count, 48)), read(images(count, 48)))
    with pytest.raises(Exception, match=r"(?i)dimension|shape|size"):
        read(images(1, 32))


def test_graphs_contain_the_preprocessing_of_images(graph_of_one_size: Path) -> None:
    if graph_of_one_size.suffix == ".onnx":
        session = pytest.importorskip("onnxruntime").InferenceSession(graph_of_one_size)
        values = session.get_modelmeta().custom_metadata_map
        notes = {name: json.loads(values[name]) for name in ("mean", "std", "resize", "size", "digest")}
    else:
        files: dict[str, Any] = {"dino_lightning.json": ""}
        torch.export.load(graph_of_one_size, extra_files=files)
        notes = json.loads(files["dino_lightning.json"])
    digest = load_network(str(graph_of_one_size.parent / "weights.safetensors")).digest
    assert notes == {
        "mean": PREPROCESSING["mean"],
        "std": PREPROCESSING["std"],
        "resize": 40,
        "size": 32,
        "digest": digest,
    }


@pytest.mark.slow
def test_a_network_with_a_fixed_image_size_is_exported_for_that_size(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = {"dynamic_img_size": False, "depth": 1}
    checkpoint = exported(tmp_path, TimmConfig(name="test_vit2", arguments=arguments), image_size=32)
    write(checkpoint, tmp_path / "backbone.pt2", format="torch")
    assert "takes any number of images of 32 x 32 pixels only" in capsys.readouterr().err
    batch = images(3, 32)
    check_close(load_network(str(checkpoint)).backbone(batch), program_reader(tmp_path / "backbone.pt2")(batch))


@pytest.mark.slow
def test_a_graph_of_an_xcit(tmp_path: Path) -> None:
    """A network of timm with dynamic sizes and its own position encoding."""
    small = {"depth": 1, "cls_attn_layers": 1, "embed_dim": 32, "num_heads": 1}
    checkpoint = exported(tmp_path, TimmConfig(name="xcit_nano_12_p16_224", arguments=small))
    write(checkpoint, tmp_path / "backbone.pt2", format="torch")
    batch = images(3, 32, 64)
    check_close(load_network(str(checkpoint)).backbone(batch), program_reader(tmp_path / "backbone.pt2")(batch))


# ----------------------------------------------------------------------------------------------------------- folders


@FOLDERS_OF_TIMM
@pytest.mark.parametrize(
    "config", [TINY, REGISTERS, RESNET, ViTConfig(width=48, depth=1, heads=3, patch_size=8)], ids=str
)
@pytest.mark.slow_after_first(1)
def test_timm_loads_the_folder(config: BackboneConfig, tmp_path: Path) -> None:
    write(exported(tmp_path, config), tmp_path / "network", format="timm")
    theirs = timm.create_model(f"local-dir:{tmp_path / 'network'}", pretrained=True).eval()
    ours = load_network(str(tmp_path / "weights.safetensors"))
    check_close(ours.backbone(images(2, 32)), theirs(images(2, 32)))
    settings = timm.data.resolve_model_data_config(theirs)  # type: ignore[attr-defined]
    assert (list(settings["mean"]), list(settings["std"])) == (PREPROCESSING["mean"], PREPROCESSING["std"])
    assert (settings["crop_pct"], settings["interpolation"]) == (32 / 40, "bicubic")
    assert load_network(str(tmp_path / "network")).digest == ours.digest


@pytest.mark.parametrize(
    "config",
    first(
        [
            TINY,
            RESNET,
            ViTConfig(width=48, depth=2, heads=3, patch_size=16),
            TimmConfig(name="resnet50"),
            TimmConfig(name="vit_tiny_patch16_224"),
        ],
        fast=3,
    ),
    ids=str,
)
@pytest.mark.slow_after_first(1)
def test_transformers_loads_the_folder(config: BackboneConfig, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    write(exported(tmp_path, config), tmp_path / "network", format="huggingface")
    is_vit = "resnet" not in str(config)
    arguments = {"add_pooling_layer": False} if is_vit else {}
    theirs = transformers.AutoModel.from_pretrained(tmp_path / "network", **arguments).eval()
    assert type(theirs).__name__ == ("ViTModel" if is_vit else "ResNetModel")
    ours = load_network(str(tmp_path / "weights.safetensors"))
    batch = images(2, 32)
    with torch.no_grad():
        output = theirs(batch)
    features = output.last_hidden_state[:, 0] if is_vit else output.pooler_output.flatten(1)
    check_close(ours.backbone(batch), features)
    again = load_network(str(tmp_path / "network"))
    assert (again.digest, again.mean, again.std) == (ours.digest, ours.mean, ours.std)
    assert (again.resize, again.size, again.name) == (40, 32, "network")
    if config.__class__ is ViTConfig:  # timm's ViTs resample position embeddings differently
        assert torch.equal(again.backbone(images(1, 64)), ours.backbone(images(1, 64)))


def test_the_processor_of_transformers_prepares_images_as_evaluations_do(tmp_path: Path) -> None:
    """Values differ by at most one step of 255, because the libraries round resized values differently."""
    transformers = pytest.importorskip("transformers")
    write(exported(tmp_path), tmp_path / "network", format="huggingface")
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "network")
    smooth = np.add.outer(np.linspace(0, 120, 80), np.linspace(0, 130, 100))
    image = Image.fromarray(np.stack([smooth, smooth.max() - smooth, smooth / 2], axis=-1).astype(np.uint8))
    theirs = processor(image, return_tensors="pt")["pixel_values"][0]
    ours = center_view(load_network(str(tmp_path / "weights.safetensors")))(image)
    assert theirs.shape == ours.shape
    std = torch.tensor(PREPROCESSING["std"]).view(3, 1, 1)
    assert ((theirs - ours) * std).abs().max() <= 1.01 / 255


# ------------------------------------------------------------------------------------------------------ the original


def test_original_vit(tmp_path: Path) -> None:
    write(exported(tmp_path), tmp_path / "backbone.pth", format="original")
    weights = torch.load(tmp_path / "backbone.pth", weights_only=True)
    parts = ["norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"]
    layers = ["patch_embed.proj", *(f"blocks.0.{part}" for part in parts), "norm"]
    expected = {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    assert weights.keys() == expected | {"cls_token", "pos_embed"}
    network, again = load_network(str(tmp_path / "weights.safetensors")), load_network(str(tmp_path / "backbone.pth"))
    assert isinstance(again.backbone, OriginalViT)
    assert again.digest == network.digest


@pytest.mark.slow
def test_torchvision_loads_the_original_resnet(tmp_path: Path) -> None:
    write(exported(tmp_path, RESNET), tmp_path / "backbone.pth", format="original")
    theirs = torchvision.models.resnet18()
    theirs.fc = nn.Identity()
    theirs.load_state_dict(torch.load(tmp_path / "backbone.pth", weights_only=True), strict=True)
    network = load_network(str(tmp_path / "weights.safetensors"))
    check_close(network.backbone(images(2, 64)), theirs.eval()(images(2, 64)))


@pytest.mark.slow
def test_original_xcit(tmp_path: Path) -> None:
    write(exported(tmp_path, TimmConfig(name="xcit_nano_12_p16_224")), tmp_path / "backbone.pth", format="original")
    names = torch.load(tmp_path / "backbone.pth", weights_only=True).keys()
    assert {"cls_attn_blocks.0.attn.qkv.weight", "pos_embeder.token_projection.weight"} <= names
    network, again = load_network(str(tmp_path / "weights.safetensors")), load_network(str(tmp_path / "backbone.pth"))
    assert again.digest == network.digest


# ---------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("config", "words", "sentence"),
    [
        (TINY, "format=onxx output=a.onnx", "format=onxx: did you mean 'onnx'?"),
        (TINY, "format=torch output=a.onnx", "output=a.onnx: format=torch writes a file that ends in .pt2."),
        (TINY, "format=timm output=a.onnx", "output=a.onnx: format=timm writes a folder."),
        (TINY, "format=timm output=here", "output=here already exists; remove it or choose another name."),
        (TINY, "format=timm", "output has no value: give it on the command line, output=…; it is: Output path, "),
        (TINY, "format=timm output=a image_size=64", "image_size=64 belongs to format=onnx and format=torch"),
        (TINY, "format=torch output=a.pt2 image_size=0", "image_size=0: expected at least 1."),
        (TINY, "format=torch output=a.pt2 image_size=60", "image_size=60 is not a multiple of the patch size 8"),
        (TINY, "format=timm otput=a", "otput is not a key of the configuration; did you mean 'output'?"),
        (
            REGISTERS,
            "format=huggingface output=a",
            "transformers has no class for this network (ViT, width 64, depth 1, 1 heads, "
            "patch size 8, 2 registers, trained at 32 pixels); formats for any network are timm, onnx and torch.",
        ),
        (
            TimmConfig(name="test_resnet"),
            "format=huggingface output=a",
            "has no class for this network (timm's test_resnet); formats",
        ),
        (TimmConfig(name="test_resnet"), "format=original output=a.pth", "the original has no such network (timm's"),
        (REGISTERS, "format=original output=a.pth", "the original has no such network (ViT, width 64"),
        (
            ViTConfig(width=48, depth=1, heads=3),
            "format=original output=a.pth",
            "the original always uses width / 64 heads, but this network has 3 heads and width 48",
        ),
    ],
)
def test_wrong_arguments_are_refused_in_one_sentence(
    config: BackboneConfig,
    words: str,
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    if "huggingface" in words:
        pytest.importorskip("transformers")
    (tmp_path / "here").mkdir()
    checkpoint = exported(tmp_path, config)
    assert main(["export", f"checkpoint={checkpoint}", *words.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("dino export: ")
    assert sentence in error
    assert error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "weights.safetensors"]


def test_an_output_that_cannot_be_written_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    words = [f"checkpoint={exported(tmp_path)}", "format=timm", f"output={tmp_path / 'file' / 'network'}"]
    assert main(["export", *words]) == 2
    assert "is a file or inside a file" in capsys.readouterr().err


def test_paths_may_have_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Like for the other commands, although Hydra's grammar does not allow them."""
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / "Öland (2023)"
    folder.mkdir()
    exported(folder, ViTConfig(width=64, depth=1, heads=1, patch_size=8))
    words = [f"checkpoint={folder / 'weights.safetensors'}", "output=~/it's.pth", "format=original"]
    assert main(["export", *words]) == 0
    assert (tmp_path / "it's.pth").is_file()
