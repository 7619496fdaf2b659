"""Masked patches in the network: every pass gives the features and patch tokens of the slow one."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles_masked_patches import slow_tokens
from torch import Tensor
from torch._dynamo.utils import counters

from dino_lightning.checkpoints import Description, export_backbone, load_network
from dino_lightning.config import ComputeConfig, ViTConfig
from dino_lightning.models.kernels import tiles
from dino_lightning.models.masking import Masks, draw_masks
from dino_lightning.models.multi_crop import MultiCropNetwork
from dino_lightning.models.packed_block import compiled_pass
from dino_lightning.models.vit import OriginalViT

GRID = (4, 4)


def vit(rate: float = 0.0, **options: Any) -> OriginalViT:
    """With weights far from their start, the same on each call."""
    torch.manual_seed(0)
    config = ViTConfig(**{"width": 32, "depth": 3, "heads": 2, "patch_size": 8, **options})
    network = OriginalViT(config, image_size=32, drop_path_rate=rate).double()
    network.learn_mask_token()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return network


def crops(sizes: tuple[int, ...] = (32, 32, 16)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(3, 3, side, side, generator=generator, dtype=torch.float64) for side in sizes]


def masks(seed: int = 2, probability: float = 0.7) -> Masks:
    drawn = draw_masks(np.random.default_rng(seed), 6, GRID, probability=probability, share=[0.1, 0.5])
    return Masks.of(drawn, like=torch.zeros(1, dtype=torch.float64))


def both(network: OriginalViT, given: Masks, *, replace: bool, step: ComputeConfig) -> tuple[Tensor, Tensor]:
    return MultiCropNetwork(network, torch.nn.Identity(), compute=step).features_and_patches(
        crops(), given, replace=replace
    )


@pytest.mark.parametrize("registers", [0, 2])
@pytest.mark.parametrize("replace", [True, False])
@pytest.mark.parametrize("fused", [True, False])
def test_features_and_masked_patches(fused: bool, replace: bool, registers: int) -> None:
    network, given = vit(registers=registers), masks()
    features_SD, patches_PD = both(network, given, replace=replace, step=ComputeConfig(fused=fused))
    weights, expected, read = dict(network.state_dict()), [], []
    for number, crop in enumerate(crop for view in crops() for crop in view):
        hidden_hw = given.hidden[number] if number < 6 else None
        tokens_TD = slow_tokens(weights, crop, hidden_hw if replace else None, registers)
        expected.append(tokens_TD[0])
        if hidden_hw is not None:
            read += [tokens_TD[1 + registers + n] for n, hidden in enumerate(hidden_hw.flatten().tolist()) if hidden]
    torch.testing.assert_close(features_SD, torch.stack(expected), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(patches_PD, torch.stack(read), rtol=1e-9, atol=1e-9)


def outcome(network: OriginalViT, step: ComputeConfig, given: Masks, compiled: bool = False) -> dict[str, Tensor]:
    network.zero_grad()
    network.apply_compute(step)
    wrapped = MultiCropNetwork(network, torch.nn.Identity(), compute=step)
    for block in network.blocks if compiled else []:
        block.pass_function = compiled_pass("eager")  # type: ignore[assignment]
    features_SD, patches_PD = wrapped.features_and_patches(crops(), given, replace=True)
    (features_SD.square().sum() + (patches_PD * torch.arange(1, 33)).sum()).backward()
    gradients = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
    return {"features": features_SD.detach(), "patches": patches_PD.detach(), **gradients}


@pytest.mark.parametrize("how", ["fused", "checkpointed", "plain and checkpointed", "tiled", "compiled", "subset"])
@pytest.mark.parametrize("probability", [0.7, 0.0])
@pytest.mark.slow_after_first(5)
def test_all_passes_equal_the_plain_pass(how: str, probability: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where nothing is masked: the mask token still has a gradient, or DDP would wait for it."""
    given = masks(probability=probability)
    plain = outcome(vit(), ComputeConfig(fused=False), given)
    if how == "tiled":
        monkeypatch.setattr(tiles, "ROWS", 50)
        monkeypatch.setattr(tiles, "MIN_ELEMENTS", 0)
    network = vit(drop_path="subset" if how == "subset" else "sample").train()
    step = ComputeConfig(fused="plain" not in how, gradient_checkpointing="checkpointed" in how)
    ours = outcome(network, step, given, compiled=how == "compiled")
    assert ours.keys() == plain.keys() == {"features", "patches", *dict(network.named_parameters())}
    assert bool(ours["mask_token"].any()) is (probability > 0)
    for name, value in ours.items():
        torch.testing.assert_close(value, plain[name], rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.slow
def test_the_plain_pass_is_compiled_once() -> None:
    """However many patches are masked: as many graphs after the third step as after the first."""
    torch.compiler.reset()
    counters.clear()
    network, made = vit(depth=1), []
    wrapped = MultiCropNetwork(network, torch.nn.Identity(), compute=ComputeConfig(fused=False))
    network.compile(dynamic=False, backend="eager")
    for seed in range(3):
        ours = wrapped.features_and_patches(crops(), masks(seed), replace=True)
        made.append(counters["stats"]["unique_graphs"])
        expected = both(vit(depth=1), masks(seed), replace=True, step=ComputeConfig())
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)
    assert len({len(masks(seed)) for seed in range(3)}) == 3
    assert made[0] > 0
    assert made[0] == made[2]


def test_only_the_first_crops_are_masked_where_sizes_are_equal() -> None:
    """Local crops as large as the global ones join them in one batch of the plain pass."""
    network, given = vit(), masks()
    results = []
    for fused in (True, False):
        wrapped = MultiCropNetwork(network, torch.nn.Identity(), compute=ComputeConfig(fused=fused))
        results.append(wrapped.features_and_patches(crops((32, 32, 32)), given, replace=True))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(results[0][0][6:], network(crops((32, 32, 32))[2]), rtol=1e-9, atol=1e-9)


def test_the_mask_token_exists_only_in_training() -> None:
    assert "mask_token" not in OriginalViT(ViTConfig(depth=1), image_size=32, drop_path_rate=0.0).state_dict()
    assert list(vit().state_dict())[-1] != "mask_token", "it is next to the other tokens"


def test_exported_weights_have_no_mask_token(tmp_path: Path) -> None:
    """Neither an export nor a network that is loaded from a training checkpoint has one."""
    network, config = vit().float(), ViTConfig(width=32, depth=3, heads=2, patch_size=8)
    description = Description(config, 32, mean=[0.5] * 3, std=[0.2] * 3)
    export_backbone(network.state_dict(), tmp_path / "teacher.safetensors", description)
    state = {f"teacher.backbone.{name}": weight for name, weight in network.state_dict().items()}
    torch.save({"state_dict": state, "network": Description(config, 32).to_dict()}, tmp_path / "last.ckpt")
    images = torch.randn(2, 3, 32, 32)
    for name in ("teacher.safetensors", "last.ckpt"):
        loaded = load_network(str(tmp_path / name)).backbone
        assert "mask_token" not in loaded.state_dict()
        torch.testing.assert_close(loaded(images), network.eval()(images).detach())
