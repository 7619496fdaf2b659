"""Registers: tokens without position that every pass computes and nothing reads."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import oracles
import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from dino_lightning.checkpoints import Description, export_backbone, load_network
from dino_lightning.config import BackboneConfig, ComputeConfig, ViTConfig
from dino_lightning.evaluation.retrieval.descriptors import cls_and_gem
from dino_lightning.models.backbones import build_backbone
from dino_lightning.models.kernels import tiles
from dino_lightning.models.multi_crop import MultiCropNetwork
from dino_lightning.models.packed_block import compiled_pass
from dino_lightning.models.tokens import cls_attention, linear_features, patch_tokens
from dino_lightning.models.vit import OriginalViT

R, PATCH, HEADS = 3, 8, 2
CONFIG = ViTConfig(width=32, depth=3, heads=HEADS, patch_size=PATCH, registers=R)


def vit(rate: float = 0.0, *, config: ViTConfig = CONFIG, dtype: torch.dtype = torch.float64) -> OriginalViT:
    """With weights far from their start, the same on each call."""
    torch.manual_seed(0)
    network = OriginalViT(config, image_size=32, drop_path_rate=rate).to(dtype)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return network


def crops(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in ((3, 3, 32, 32), (5, 3, 16, 16))]


def slow(network: OriginalViT, images: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens after the last norm (B, 1 + R + N, D) and the last block's attention, from the equations."""
    weights = dict(network.state_dict())
    no_position = torch.zeros(1, 1, weights["pos_embed"].shape[-1], dtype=torch.float64)
    table = torch.cat([no_position, weights["pos_embed"]], dim=1)
    x = oracles.vit_tokens({**weights, "pos_embed": table}, images, patch=PATCH)
    x, maps = torch.cat([x[:, :1], weights["reg_token"].expand(len(x), -1, -1), x[:, 1:]], dim=1), []
    for i in range(CONFIG.depth):
        x, maps = oracles.block(x, weights, f"blocks.{i}", heads=HEADS)
    return oracles.layer_norm(x, weights, "norm"), torch.stack(maps, dim=1)


@pytest.mark.parametrize("size", [32, 16])
def test_tokens_are_class_registers_patches(size: int) -> None:
    network, images = vit(), crops()[0][..., :size, :size]
    x_BTD, maps_BhTT = slow(network, images)
    side = size // PATCH
    exact: Any = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(network(images), x_BTD[:, 0], **exact)
    torch.testing.assert_close(network([images]), x_BTD[:, 0], **exact)
    patches = x_BTD[:, 1 + R :]
    torch.testing.assert_close(patch_tokens(network, images), patches.unflatten(1, (side, side)), **exact)
    expected = torch.stack([x_BTD[:, 0], patches.mean(dim=1)], dim=-1).flatten(1)
    torch.testing.assert_close(linear_features(network, images, n_last_blocks=1, avgpool=True), expected, **exact)
    attention = maps_BhTT[:, :, 0, 1 + R :].unflatten(-1, (side, side))
    torch.testing.assert_close(cls_attention(network, images), attention, **exact)


def test_retrieval_pools_only_patches() -> None:
    network, images = vit(), crops()[0]
    x_BTD, _ = slow(network, images)
    gem_BD = x_BTD[:, 1 + R :].clamp(min=1e-6).pow(3).mean(dim=1).pow(1 / 3)
    ours = cls_and_gem(network, images, power=3)
    torch.testing.assert_close(ours.double(), torch.cat([x_BTD[:, 0], gem_BD], dim=1), rtol=1e-4, atol=1e-6)


def gradients(network: OriginalViT, features_SD: Tensor) -> dict[str, Tensor]:
    network.zero_grad()
    features_SD.square().sum().backward()
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("how", ["plain", "checkpointed", "tiled", "compiled"])
@pytest.mark.slow_after_first(3)
def test_one_pass_over_all_crops_equals_timm(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network = vit()
    network.apply_compute(ComputeConfig(gradient_checkpointing=how == "checkpointed"))
    if how == "tiled":
        monkeypatch.setattr(tiles, "ROWS", 50)
        monkeypatch.setattr(tiles, "MIN_ELEMENTS", 0)
    for block in network.blocks if how == "compiled" else []:
        block.pass_function = compiled_pass("eager")  # type: ignore[assignment]
    ours, plain = network(crops()), torch.cat([network(images) for images in crops()])
    torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-10)
    one, other = gradients(network, ours), gradients(network, plain)
    assert one.keys() == other.keys() == dict(network.named_parameters()).keys()
    for name, gradient in one.items():
        assert (gradient - other[name]).abs().max() <= 1e-11 * other[name].abs().max(), name
    assert one["reg_token"].abs().amax(dim=-1).min() > 0, "each register takes part"


def test_subsets_of_drop_path_are_whole_crops() -> None:
    """At a rate of 0 a subset is all crops; else a crop of no subset leaves a block as it came."""
    network = vit(config=replace(CONFIG, drop_path="subset")).train()
    torch.testing.assert_close(network(crops()), vit()(crops()))
    network = vit(0.9, config=replace(CONFIG, depth=2, drop_path="subset")).train()  # rates 0 and 0.9
    first: Any = network.blocks[0]
    before = [first(network._pos_embed(network.patch_embed(images)))[:, 0] for images in crops()]
    unchanged_S = torch.isclose(network(crops()), network.norm(torch.cat(before))).all(dim=1)
    # Of 3 and 5 crops one each computes a branch of the second block, and there are two branches.
    assert 1 <= unchanged_S[:3].sum() <= 2
    assert 3 <= unchanged_S[3:].sum() <= 4


def test_the_plain_network_computes_the_same() -> None:
    packed = MultiCropNetwork(vit(), torch.nn.Identity())
    plain = MultiCropNetwork(vit(), torch.nn.Identity(), compute=ComputeConfig(fused=False))
    torch.testing.assert_close(packed.features(crops()), plain.features(crops()), rtol=1e-10, atol=1e-10)


def test_without_registers_nothing_changes() -> None:
    state, other = vit(config=replace(CONFIG, registers=0)).state_dict(), vit().state_dict()
    assert list(state)[:3] == ["cls_token", "pos_embed", "patch_embed.proj.weight"]
    assert list(other)[:3] == ["cls_token", "reg_token", "pos_embed"]
    assert state["pos_embed"].shape == (1, 1 + 16, 32)
    assert other["pos_embed"].shape == (1, 16, 32)
    assert other.keys() - state.keys() == {"reg_token"}


def test_registers_start_with_different_values() -> None:
    torch.manual_seed(0)
    registers = build_backbone(replace(CONFIG, width=512, registers=8), image_size=32, drop_path=False).reg_token[0]  # type: ignore[index]
    assert registers.std().item() == pytest.approx(0.02, rel=0.05)
    assert torch.pdist(registers).min() > 0.5


def exported(path: Path, config: BackboneConfig, *, image_size: int) -> torch.nn.Module:
    torch.manual_seed(1)
    network = build_backbone(config, image_size=image_size, drop_path=False).eval()
    export_backbone(network.state_dict(), path, Description(config, image_size, [0.5] * 3, [0.2] * 3))
    return network


@pytest.mark.parametrize(("width", "depth", "heads", "size"), [(32, 2, 2, 32), (192, 12, 3, 224)])
def test_timm_loads_the_exported_file(tmp_path: Path, width: int, depth: int, heads: int, size: int) -> None:
    config = ViTConfig(width=width, depth=depth, heads=heads, patch_size=16, registers=4)
    network = exported(tmp_path / "teacher.safetensors", config, image_size=size)
    with safe_open(tmp_path / "teacher.safetensors", framework="pt") as file:
        recipe = json.loads(file.metadata()["timm"])
    assert recipe["reg_tokens"] == 4
    loaded: Any = timm.create_model(**recipe)
    loaded.load_state_dict(load_file(tmp_path / "teacher.safetensors"))
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(images), network(images), rtol=1e-5, atol=1e-5)


def test_exported_weights_load_unchanged(tmp_path: Path) -> None:
    config = replace(CONFIG, width=128)
    network = exported(tmp_path / "teacher.safetensors", config, image_size=48)
    described = Description.from_dict(Description(config, 48).to_dict())
    assert described.backbone == config
    assert "3 registers" in str(described)
    torch.save(network.state_dict(), tmp_path / "bare.pth")  # nothing said: recognized by names and shapes
    for name in ("teacher.safetensors", "bare.pth"):
        loaded = load_network(str(tmp_path / name))
        assert loaded.backbone.num_prefix_tokens == 1 + R
        images = torch.randn(2, 3, 48, 32)
        torch.testing.assert_close(loaded.backbone(images), network(images).detach())
