"""Crops of all resolutions in one pass of the layers: the numbers of timm's pass over each resolution."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dino_lightning.config import ComputeConfig, ViTConfig
from dino_lightning.models.kernels import tiles
from dino_lightning.models.kernels.packing import drawn_subset, first_tokens, pack, sampled_scales, split
from dino_lightning.models.vit import OriginalViT

CONFIG = {"width": 48, "depth": 3, "heads": 3, "patch_size": 8}
CPU = torch.device("cpu")


def vit(
    rate: float = 0.0, *, dtype: torch.dtype = torch.float64, step: ComputeConfig | None = None, **options: Any
) -> OriginalViT:
    """With weights far from their start, the same on each call."""
    torch.manual_seed(0)
    network = OriginalViT(ViTConfig(**{**CONFIG, **options}), image_size=32, drop_path_rate=rate).to(dtype)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    network.apply_compute(step or ComputeConfig())
    return network


def crops(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = ((3, 3, 32, 32), (5, 3, 16, 16))
    return [torch.randn(shape, dtype=dtype, generator=generator) for shape in shapes]


def gradients(network: OriginalViT, features_SD: Tensor) -> dict[str, Tensor]:
    network.zero_grad()
    features_SD.square().sum().backward()
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize(("dtype", "relative"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_features_and_gradients_equal_timm(dtype: torch.dtype, relative: float, checkpointed: bool) -> None:
    """Relative to the largest entry; only the order of sums differs."""
    network = vit(dtype=dtype, step=ComputeConfig(gradient_checkpointing=checkpointed))
    ours, plain = network(crops(dtype)), torch.cat([network(images) for images in crops(dtype)])
    assert (ours - plain).abs().max() <= relative * plain.abs().max()
    one, other = gradients(network, ours), gradients(network, plain)
    assert one.keys() == other.keys()
    for name, gradient in one.items():
        assert (gradient - other[name]).abs().max() <= relative * other[name].abs().max(), name


def test_checkpointing_keeps_the_input_of_a_block_only() -> None:
    """Numbers per token and block that the backward pass waits with, weights aside."""

    def kept(step: ComputeConfig) -> float:
        network, numbers = vit(step=step, depth=6), {}
        weights = {parameter.data_ptr() for parameter in network.parameters()}

        def note(tensor: Tensor) -> Tensor:
            if tensor.data_ptr() not in weights and tensor.numel() >= 56 * 48:
                numbers[tensor.data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            features = network([torch.randn(16, 3, 32, 32, dtype=torch.float64)])
        features.sum().backward()
        return sum(numbers.values()) / (16 * 17 * 48 * 6)

    images = 3 * 32 * 32 / (17 * 48 * 6)
    assert kept(ComputeConfig(gradient_checkpointing=True)) == pytest.approx(1 + images)
    # Ten widths a token, but of the last block its input, keys and values only.
    assert kept(ComputeConfig()) == pytest.approx((5 * 10 + 3) / 6 + images, rel=0.01)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_drop_path_drops_crop_by_crop(checkpointed: bool) -> None:
    """Equal to timm's blocks with the same factors; the class token sees them through its own crop only."""
    network = vit(0.5, step=ComputeConfig(gradient_checkpointing=checkpointed)).train()
    torch.manual_seed(5)
    ours = network(crops())
    torch.manual_seed(5)
    rates = tuple(block.drop_path1.drop_prob if index else 0.0 for index, block in enumerate(network.blocks))  # type: ignore[union-attr]
    x_MD, shapes = pack([network._pos_embed(network.patch_embed(images)) for images in crops()])
    scales = sampled_scales(rates, shapes, CPU)  # type: ignore[arg-type]
    for index, block in enumerate(network.blocks):
        block.eval()
        first, second = (
            split(scale, shapes) for scale in (scales[index].double() if index else torch.ones(2, len(x_MD), 1))
        )
        parts = []
        for x_BND, one, two in zip(split(x_MD, shapes), first, second, strict=True):
            x_BND = x_BND + one * block.attn(block.norm1(x_BND))  # type: ignore[operator]
            parts.append(x_BND + two * block.mlp(block.norm2(x_BND)))  # type: ignore[operator]
        x_MD, _ = pack(parts)
    torch.testing.assert_close(ours, network.norm(first_tokens(x_MD, shapes)), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(ours, network(crops()), atol=1e-3), "each pass draws other numbers"
    assert torch.equal(network.eval()(crops()), network(crops())), "not drawn in evaluation"


def test_factors_of_drop_path() -> None:
    """0 or 1 / (1 - rate), the same for all tokens of a crop, another one for each crop and branch, of mean 1."""
    shapes = ((400, 5), (600, 2))
    never, often = sampled_scales((0.0, 0.4), shapes, CPU)
    assert torch.equal(never, torch.ones(2, 3200, 1))
    assert often.unique().tolist() == [0.0, pytest.approx(1 / 0.6)]
    for part_BN1 in split(often[0], shapes):
        assert torch.equal(part_BN1, part_BN1[:, :1].expand_as(part_BN1))
    by_crop_2S = torch.stack([first_tokens(scale, shapes).flatten() for scale in often])
    # Two samples of 1000: five standard deviations of their means.
    assert by_crop_2S.mean(dim=1).tolist() == pytest.approx([1, 1], abs=5 * (0.4 / 0.6 / 1000) ** 0.5)
    assert (by_crop_2S[0] != by_crop_2S[1]).float().mean() == pytest.approx(2 * 0.6 * 0.4, abs=0.08)


def test_subsets_of_drop_path() -> None:
    """Each pass draws a fixed number of whole crops of each resolution, scaled so that the mean is unchanged."""
    shapes = ((10, 3), (20, 2))
    subset = drawn_subset(0.25, shapes, CPU)
    assert subset.shapes == ((8, 3), (15, 2))
    assert len(subset.rows_m.unique()) == len(subset.rows_m) == 8 * 3 + 15 * 2
    large, small = subset.rows_m[:24].view(8, 3), subset.rows_m[24:].view(15, 2)
    assert (large[:, 0] % 3 == 0).all()
    assert (large == large[:, :1] + torch.arange(3)).all()
    assert (small == small[:, :1] + torch.arange(2)).all()
    assert small.min() >= 30
    assert subset.scale_m1.unique().tolist() == pytest.approx([1.25, 20 / 15])
    assert not torch.equal(subset.rows_m, drawn_subset(0.25, shapes, CPU).rows_m)


def test_subset_mode_computes_the_branch_for_its_crops_only() -> None:
    network = vit(0.5, depth=2, drop_path="subset").train()
    torch.manual_seed(3)
    ours = network(crops())
    torch.manual_seed(3)
    x_MD, shapes = pack([network._pos_embed(network.patch_embed(images)) for images in crops()])
    drawn = [drawn_subset(rate, shapes, CPU) for rate in (0.0, 0.0, 0.5, 0.5)][2:]
    first, second = network.blocks
    parts = [first.eval()(x_BND) for x_BND in split(x_MD, shapes)]  # type: ignore[operator]
    x_MD, _ = pack(parts)
    for branch, subset in zip(
        (lambda x: second.attn(second.norm1(x)), lambda x: second.mlp(second.norm2(x))),
        drawn,
        strict=True,  # type: ignore[operator]
    ):
        added = torch.zeros_like(x_MD)
        kept = split(torch.arange(len(subset.rows_m)), subset.shapes)
        for rows_BN in kept:
            for row_N in rows_BN:
                rows = subset.rows_m[row_N]
                added[rows] = branch(x_MD[rows][None])[0] * subset.scale_m1[row_N].double()
        x_MD = x_MD + added
    torch.testing.assert_close(ours, network.norm(first_tokens(x_MD, shapes)), rtol=1e-6, atol=1e-6)
    ours.sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_half_precision_equals_timm() -> None:
    """bfloat16 under autocast, where three blocks round each sum: some per cent of the largest feature."""
    network = vit(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, plain = network(crops(torch.float32)), torch.cat([network(x) for x in crops(torch.float32)])
    assert (ours - plain).abs().max() <= 0.05 * plain.abs().max()


def test_variable_length_attention_has_the_kernels_signature(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a pretended GPU, which computes shapes only."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from dino_lightning.models.kernels import packing
    from dino_lightning.models.kernels.packing import attend_in_one_call

    monkeypatch.setattr(packing, "constant", packing.constant.__wrapped__)  # else it would keep a pretended tensor
    with FakeTensorMode():
        qkv_M3D = torch.empty(3 * 17 + 5 * 5, 3 * 48, device="cuda", dtype=torch.bfloat16)
        mixed_MD = attend_in_one_call(qkv_M3D, ((3, 17), (5, 5)), heads=3)
    assert mixed_MD.shape == (3 * 17 + 5 * 5, 48)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch's kernel runs on GPUs only")
def test_variable_length_attention_equals_split_attention() -> None:
    """Half precision: one unit in the last place of outputs of order 1."""
    from dino_lightning.models.kernels.packing import attend, attend_in_one_call

    shapes = ((3, 197), (5, 37))
    qkv_M3D = torch.randn(3 * 197 + 5 * 37, 3 * 192, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    one, other = attend_in_one_call(qkv_M3D, shapes, heads=3), torch.cat(attend(qkv_M3D, shapes, heads=3))
    torch.testing.assert_close(one, other, rtol=0, atol=2**-7)
    a, b = (torch.autograd.grad(x.float().square().sum(), qkv_M3D)[0] for x in (one, other))
    assert (a - b).norm() < 0.02 * b.norm()


@pytest.mark.parametrize("rate", [0.0, 0.4])
@pytest.mark.parametrize(("dtype", "relative"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_tiles_do_not_change_the_results(
    dtype: torch.dtype, relative: float, rate: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles of two large crops and of eight small ones, the last ones not full."""
    network, results = vit(rate, dtype=dtype).train(), []
    monkeypatch.setattr(tiles, "ROWS", 40)
    for least in (0, 1 << 60):
        monkeypatch.setattr(tiles, "MIN_ELEMENTS", least)
        torch.manual_seed(4)
        features = network([*crops(dtype), crops(dtype)[1].flip(0)])
        results.append({"features": features.detach(), **gradients(network, features)})
    ours, plain = results
    assert ours.keys() == plain.keys()
    for name, value in ours.items():
        assert (value - plain[name]).abs().max() <= relative * plain[name].abs().max(), name


def test_tiles_are_whole_crops_of_one_resolution() -> None:
    rows = list(tiles.tiles(((3, 1500), (5, 37))))
    assert [(piece.start, piece.stop) for piece, _ in rows] == [(0, 3000), (3000, 4500), (4500, 4685)]
    assert [shapes for _, shapes in rows] == [((2, 1500),), ((1, 1500),), ((5, 37),)]


def test_tiles_keep_the_inputs_of_branches_only(monkeypatch: pytest.MonkeyPatch) -> None:
    network, kept = vit(depth=2), {}
    weights = {parameter.data_ptr() for parameter in network.parameters()}
    monkeypatch.setattr(tiles, "MIN_ELEMENTS", 0)

    def note(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in weights:
            kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    images = [torch.randn(16, 3, 32, 32, dtype=torch.float64)]
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        network(images)
    # Images, two branches of the first block, then the last block's input, keys and values; and class tokens.
    assert sum(kept.values()) / (16 * 17 * 48) == pytest.approx(3 * 32 * 32 / (17 * 48) + 2 + 3, rel=0.1)
