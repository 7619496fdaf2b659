"""The fused transformer block and the patch embedding in one product, compared with the plain forms in float64.

Without a GPU the kernels run in Triton's interpreter, and are compiled for a GPU.
"""

import copy
import importlib.util
from pathlib import Path
from typing import Any

import block_worker
import pytest
import torch
from block_worker import HEADS, SHAPES, WIDTH, inputs, make_block, outputs_and_gradients
from programs import run_program
from slow_params import first
from timm.layers import PatchEmbed
from torch import Tensor
from torch.nn.attention import SDPBackend

from dino_lightning.config import ComputeConfig, ViTConfig
from dino_lightning.models.kernels import attention as attention_kernels
from dino_lightning.models.kernels import block as whole_block
from dino_lightning.models.kernels import packing, patches
from dino_lightning.models.kernels.attention import attention, attention_backward
from dino_lightning.models.vit import OriginalViT

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

FLOAT32, BFLOAT16 = 3e-6, 2.0**-7
"""Relative errors (norms) of a block: some dozens of roundings to float32; a few to bfloat16, each by up to 2^-9."""


def errors(ours: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    assert ours.keys() == exact.keys()
    return {name: float((ours[name].double() - exact[name]).norm() / exact[name].norm()) for name in exact}


def exact(block: Any, x_MD: Tensor, shapes: Any, scales_2M1: Tensor | None) -> dict[str, Tensor]:
    scales = None if scales_2M1 is None else scales_2M1.double()
    return outputs_and_gradients(copy.deepcopy(block).double(), x_MD.double(), shapes, scales, fused=False, half=False)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("block")
    ended = run_program(block_worker.__file__, str(folder / "results"), cwd=folder)
    assert ended.returncode == 0, ended.stderr
    return torch.load(folder / "results")


@needs_triton
@pytest.mark.parametrize(("half", "dropped"), [(False, True), (True, False)])
def test_the_fused_block_equals_the_reference(interpreted: dict, half: bool, dropped: bool) -> None:
    """The interpreter truncates bfloat16 where a GPU rounds to nearest, so the error is twice as large."""
    block, (x_MD, scales_2M1) = make_block(WIDTH, HEADS), inputs(SHAPES, WIDTH)
    found = errors(interpreted[half, dropped], exact(block, x_MD, SHAPES, scales_2M1 if dropped else None))
    assert max(found.values()) <= (4 * BFLOAT16 if half else FLOAT32), found


@needs_triton
@pytest.mark.parametrize("pointer", first(["*bf16", "*fp32"]))
@pytest.mark.slow
def test_kernels_compile_for_a_gpu(pointer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter accepts Python that the compiler refuses. Compute capability 9.0, ViT-S."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from dino_lightning.models.kernels import block_kernels

    flags = {"ADD": True, "SCALED": True, "NORM": True, "BRANCH": True}
    tiles = {
        "add_and_norm": (4, 512),
        "norm_backward": (4, 512),
        "scaled_with_sums": (16, 128),
        "gelu_backward": (16, 128),
        "pack_with_sums": (16, 128),
    }
    for name, (rows, columns) in tiles.items():
        kernel = getattr(block_kernels, name)
        constants = {"ROWS": rows, "COLUMNS": columns, **flags, **({"D": 384} if columns == 512 else {})}
        constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
        kinds = dict.fromkeys(kernel.arg_names, pointer) | dict.fromkeys(constants, "constexpr")
        kinds |= {key: "i32" for key in kinds if key in ("M", "D", "programs") and key not in constants}
        kinds |= {key: "*fp32" for key in kinds if key.startswith(("scale", "weight", "bias", "mean", "rstd", "sums"))}
        kinds |= {"eps": "fp32"} if "eps" in kinds else {}
        aligned = [key for key in kinds if kinds[key].startswith("*")] + ([] if columns == 512 else ["D"])
        attrs = {(kernel.arg_names.index(key),): [["tt.divisibility", 16]] for key in aligned}
        source = ASTSource(kernel, kinds, constexprs=constants, attrs=attrs)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
        assert "ld.global.v4" in compiled.asm["ptx"], f"{name} reads vectors of 16 bytes"


def test_the_fused_block_is_not_available_on_a_cpu() -> None:
    assert not whole_block.available(torch.zeros(4, WIDTH), make_block(WIDTH, HEADS))
    assert not patches.available([torch.zeros(1, 3, 32, 32)], PatchEmbed(patch_size=16, embed_dim=8))


@pytest.mark.parametrize("kernel", ["CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", None])
def test_attention_has_the_kernels_signatures(kernel: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a fake GPU, which computes only shapes; None for sequences of several lengths."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    varlen, kind = kernel is None, torch.float32 if kernel == "EFFICIENT_ATTENTION" else torch.bfloat16
    if kernel is not None:
        chosen = SDPBackend.__members__[kernel].value
        monkeypatch.setattr(attention_kernels, "_chosen", lambda *_: chosen)
    monkeypatch.setattr(packing, "constant", packing.constant.__wrapped__)  # otherwise it would cache a fake tensor
    with FakeTensorMode():
        qkv_M3D = torch.empty(76, 3 * WIDTH, device="cuda", dtype=kind)
        out_MD, kept, kernels = attention(qkv_M3D, SHAPES, heads=HEADS, varlen=varlen)
        parts = attention_backward(out_MD, qkv_M3D, out_MD, kept, kernels, SHAPES, heads=HEADS, varlen=varlen)
    assert out_MD.shape == (76, WIDTH)
    assert [q.shape for q, _, _ in parts] == ([(76, WIDTH)] if varlen else [(B * N, WIDTH) for B, N in SHAPES])


def test_the_patch_product_equals_the_convolutions() -> None:
    embed = PatchEmbed(None, 16, embed_dim=8, flatten=False, output_fmt="NHWC", strict_img_size=False).double()
    views = [torch.randn(3, 3, 64, 48).double() for _ in range(2)] + [torch.randn(2, 3, 32, 32).double()]
    plain = [torch.cat([embed(view) for view in views[:2]]), embed(views[2])]
    ours = patches.embed_patches(views, embed.proj)
    gradients = [
        torch.autograd.grad(torch.cat([each.flatten() for each in one]).sin().sum(), list(embed.parameters()))
        for one in (ours, plain)
    ]
    for one, other in zip([*ours, *gradients[0]], [*plain, *gradients[1]], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)


# ------------------------------------------------------------------------------------------------------- on a GPU


@needs_triton
@needs_cuda
@pytest.mark.parametrize("width", [192, 384, 768])
@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("kind", ["float32", "split", "varlen"])
def test_the_gpu_equals_the_reference(kind: str, dropped: bool, width: int) -> None:
    """In bfloat16 no number is further from the exact one than a quarter more than the plain block's."""
    shapes, block = ((4, 197), (16, 37)), make_block(width, width // 64).cuda()
    x_MD, scales_2M1 = (x.cuda() for x in inputs(shapes, width))
    scales, half = scales_2M1 if dropped else None, kind != "float32"
    right = exact(block, x_MD, shapes, scales)
    block.attention = "varlen" if kind == "varlen" else "split"
    with torch.autocast("cuda", torch.bfloat16, enabled=half):
        assert whole_block.available(x_MD, block)
    found = errors(outputs_and_gradients(block, x_MD, shapes, scales, fused=True, half=half), right)
    if not half:
        assert max(found.values()) <= FLOAT32, found
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(whole_block, "available", lambda *_: False)
        plain = errors(outputs_and_gradients(block, x_MD, shapes, scales, fused=False, half=half), right)
    assert all(found[name] <= 1.25 * plain[name] + 1e-6 for name in found), (found, plain)


@needs_triton
@needs_cuda
def test_the_gpu_network_equals_that_of_the_cpu() -> None:
    """Features and all gradients of the whole network, float32 on the GPU against float64 on the CPU."""
    torch.manual_seed(0)
    config = ViTConfig(width=192, depth=3, heads=3, patch_size=16)
    network = OriginalViT(config, image_size=64, drop_path_rate=0.0)
    network.apply_compute(ComputeConfig())
    crops = [torch.randn(3, 3, 64, 64), torch.randn(3, 3, 64, 64), torch.randn(3, 3, 32, 32)]
    results = []
    for kind, device in ((torch.float64, "cpu"), (torch.float32, "cuda")):
        network.to(kind).to(device).zero_grad()
        features_SD = network([crop.to(device, kind) for crop in crops])
        features_SD.sin().sum().backward()
        gradients = {name: p.grad.cpu().clone() for name, p in network.named_parameters() if p.grad is not None}
        results.append({"features": features_SD.detach().cpu(), **gradients})
    found = errors(results[1], results[0])
    assert max(found.values()) <= 1e-5, found
