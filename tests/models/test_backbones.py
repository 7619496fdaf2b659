"""The original's Vision Transformer on timm's blocks, and timm's own networks."""

import json
from pathlib import Path

import oracles
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors import safe_open
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from dino_lightning.checkpoints import Description, export_backbone
from dino_lightning.config import BackboneConfig, TimmConfig, ViTConfig
from dino_lightning.errors import UserError
from dino_lightning.models.backbones import build_backbone
from dino_lightning.models.tokens import cls_attention, has_attention
from dino_lightning.models.vit import OriginalViT, resample_position_embedding

SMALL = ViTConfig(width=32, depth=2, heads=2, patch_size=16)
NETWORKS = {"resnet": "test_resnet", "convnext": "test_convnext", "xcit": "xcit_nano_12_p16_224", "vit": "test_vit"}


def _vit(config: ViTConfig = SMALL, *, image_size: int = 224, drop_path_rate: float = 0.0) -> OriginalViT:
    """With weights of order 1 / sqrt(width), so that every path contributes."""
    vit = OriginalViT(config, image_size=image_size, drop_path_rate=drop_path_rate)
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return vit


def _table(side: int, width: int = 5) -> Tensor:
    return torch.randn(1, 1 + side * side, width, dtype=torch.float64)


# ------------------------------------------------------------------------------------------------ position embedding


@pytest.mark.parametrize(("side", "h", "w"), [(14, 6, 6), (6, 9, 9), (7, 3, 5), (5, 8, 4), (4, 4, 2), (3, 1, 1)])
def test_resampling_equals_the_written_out_kernel(side: int, h: int, w: int) -> None:
    table = _table(side)
    ours = resample_position_embedding(table, h, w)
    assert ours.shape == (1, 1 + h * w, 5)
    torch.testing.assert_close(ours, oracles.resample_positions(table, h, w), rtol=1e-10, atol=1e-10)
    assert torch.equal(ours[:, 0], table[:, 0])


@pytest.mark.parametrize("side", [1, 4, 14])
def test_the_training_grid_uses_the_table_unchanged(side: int) -> None:
    table = _table(side)
    assert torch.equal(resample_position_embedding(table, side, side), table)


def test_an_equal_number_of_patches_in_another_shape_is_resampled() -> None:
    table = _table(4)
    assert not torch.equal(resample_position_embedding(table, 2, 8), table)


def test_other_resamplings_differ() -> None:
    """14 x 14 -> 6 x 6 without the 0.1, and timm's with antialiasing: far from the original in the table's norm."""
    table = _table(14, width=64)
    ours = resample_position_embedding(table, 6, 6)
    grid = table[:, 1:].reshape(1, 14, 14, -1).permute(0, 3, 1, 2)
    by_size = F.interpolate(grid, size=(6, 6), mode="bicubic").flatten(2).transpose(1, 2)
    by_timm = resample_abs_pos_embed(table, [6, 6])
    for other in (torch.cat([table[:, :1], by_size], dim=1), by_timm):
        assert other.shape == ours.shape
        assert (other - ours)[:, 1:].norm() / ours[:, 1:].norm() > 0.15


# --------------------------------------------------------------------------------------------------- the transformer


@pytest.mark.parametrize("size", [(224, 224), (96, 96), (96, 160)])
def test_features_equal_the_oracle(size: tuple[int, int]) -> None:
    """float32 through two blocks: 1e-5 is its rounding."""
    vit, images = _vit().eval(), torch.randn(2, 3, *size)
    expected, _ = oracles.vit(vit.state_dict(), images, patch=16, heads=2)
    assert expected.std() > 0.1
    torch.testing.assert_close(vit(images), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        vit.double()(images.double()),
        oracles.vit(vit.state_dict(), images.double(), patch=16, heads=2)[0],
        rtol=1e-10,
        atol=1e-10,
    )


def test_initial_values() -> None:
    """Tables, class token and linear layers: normal of std .02 cut at 2. The patch projection: a convolution's own."""
    vit = OriginalViT(ViTConfig(width=384, depth=1, heads=6, patch_size=16), image_size=224, drop_path_rate=0.1)
    for name, parameter in vit.named_parameters():
        if name == "cls_token":
            assert parameter.std().item() == pytest.approx(0.02, rel=0.15)  # 384 numbers only
        elif name == "patch_embed.proj.weight":
            assert parameter.std().item() == pytest.approx((3 * 768) ** -0.5, rel=0.02)
        elif "norm" in name:
            assert torch.equal(parameter, torch.ones_like(parameter) * name.endswith("weight"))
        elif parameter.ndim > 1:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.02)
        elif name != "patch_embed.proj.bias":
            assert not parameter.any()


def test_layer_norms_have_the_original_epsilon() -> None:
    norms = [module for module in _vit().modules() if isinstance(module, nn.LayerNorm)]
    assert len(norms) == 5
    assert all(norm.eps == 1e-6 for norm in norms)


def _drop_probabilities(network: nn.Module) -> list[float]:
    return [getattr(getattr(block, "drop_path2"), "drop_prob", 0.0) for block in network.blocks]  # noqa: B009


def test_drop_path_grows_linearly_in_the_student_and_is_absent_from_the_teacher() -> None:
    config = ViTConfig(width=32, depth=5, heads=2, patch_size=8, drop_path_rate=0.4)
    student = build_backbone(config, image_size=32, drop_path=True)
    assert _drop_probabilities(student) == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    teacher = build_backbone(config, image_size=32, drop_path=False)
    assert _drop_probabilities(teacher) == [0.0] * 5
    images = torch.randn(16, 3, 32, 32)
    assert torch.equal(teacher(images), teacher(images))
    assert not torch.equal(student(images), student(images))


def test_names_are_those_of_published_checkpoints() -> None:
    names = set(_vit(ViTConfig(width=32, depth=1, heads=2, patch_size=16)).state_dict())
    weights = [f"blocks.0.{part}" for part in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")]
    weights += ["patch_embed.proj", "norm"]
    assert names == {"cls_token", "pos_embed", *(f"{w}.{kind}" for w in weights for kind in ("weight", "bias"))}


@pytest.mark.parametrize("size", [(32, 32), (16, 40)])
def test_cls_attention_is_the_softmax(size: tuple[int, int]) -> None:
    vit = _vit(ViTConfig(width=32, depth=2, heads=4, patch_size=8), image_size=32).double().eval()
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    ours = cls_attention(vit, images)
    assert ours.shape == (2, 4, size[0] // 8, size[1] // 8)
    _, maps_BhNN = oracles.vit(vit.state_dict(), images, patch=8, heads=4)
    torch.testing.assert_close(ours.flatten(2), maps_BhNN[:, :, 0, 1:], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(ours.sum((2, 3)) + maps_BhNN[:, :, 0, 0], torch.ones(2, 4).double())


# ----------------------------------------------------------------------------------------------------- timm's networks


@pytest.mark.parametrize("name", NETWORKS.values(), ids=NETWORKS)
def test_any_network_of_timm_at_two_resolutions(name: str) -> None:
    network = build_backbone(TimmConfig(name=name), image_size=64, drop_path=True)
    for size in (64, 32):
        features = network(torch.randn(2, 3, size, size))
        assert features.shape == (2, network.num_features)
        assert features.std() > 0
    assert has_attention(network) is (name == "test_vit")


def test_the_options_reach_the_network_of_timm() -> None:
    config = TimmConfig(name="test_vit", patch_size=8, drop_path_rate=0.3, arguments={"depth": 4})
    student, teacher = (build_backbone(config, image_size=32, drop_path=flag) for flag in (True, False))
    assert student.patch_embed.patch_size == (8, 8)
    assert student.pos_embed.shape[1] == 1 + 16
    assert _drop_probabilities(student) == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert _drop_probabilities(teacher) == [0.0] * 4


def test_unknown_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match="backbone.name=resnet5O .*did you mean 'resnet50'"):
        build_backbone(TimmConfig(name="resnet5O"), image_size=64, drop_path=False)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (TimmConfig(name="test_resnet", patch_size=8), "patch_size"),
        (TimmConfig(name="test_resnet", arguments={"widht": 3}), "widht"),
    ],
)
def test_options_that_a_network_lacks_are_refused(config: TimmConfig, named: str) -> None:
    with pytest.raises(UserError, match=f"backbone.name=test_resnet .*{named}"):
        build_backbone(config, image_size=64, drop_path=False)


TINY = ViTConfig(width=192, depth=12, heads=3, patch_size=16)
"""A network that timm has under a name, for 224 pixels."""


@pytest.mark.parametrize(
    ("config", "size"),
    [
        pytest.param(TINY, 224, id="vit_tiny"),
        pytest.param(TINY, 64, id="vit_tiny for other images"),
        pytest.param(ViTConfig(width=32, depth=2, heads=4, patch_size=8), 64, id="odd vit"),
        pytest.param(TimmConfig(name="test_resnet"), 64, id="resnet"),
        pytest.param(TimmConfig(name="test_vit", patch_size=8, arguments={"depth": 2}), 64, id="vit with options"),
        pytest.param(TimmConfig(name="xcit_nano_12_p16_224"), 64, id="xcit"),
    ],
)
@pytest.mark.slow_after_first(2)
def test_exported_weights_load_into_timm(config: BackboneConfig, size: int, tmp_path: Path) -> None:
    ours = build_backbone(config, image_size=size, drop_path=True)
    with torch.no_grad():
        for tensor in ours.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(torch.rand_like(tensor) * 0.02)
    path = tmp_path / "teacher.safetensors"
    description = Description(config, size, mean=[0.1, 0.2, 0.3], std=[1.0, 2.0, 3.0])
    recipe = export_backbone(ours.state_dict(), path, description)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["timm"]) == recipe
    assert (json.loads(metadata["mean"]), json.loads(metadata["std"])) == ([0.1, 0.2, 0.3], [1.0, 2.0, 3.0])
    theirs = timm.create_model(**json.loads(metadata["timm"]), checkpoint_path=str(path))  # strict by default
    images = torch.randn(2, 3, size, size)
    features = ours.eval()(images)
    torch.testing.assert_close(theirs.eval()(images), features, rtol=1e-5, atol=1e-5)
    assert (features[0] - features[1]).abs().max() > 1e-3
