"""The breakdown of a training step: its parts are all parts of the step, as often as the step runs them."""

import json
from typing import Any

import breakdown
import pytest
from breakdown_parts import Part, step_parts
from step_batches import Setting
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from dino_lightning.config import ViTConfig
from dino_lightning.methods.flops import vit_flops


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ("", {"patch_embedding", "attention_linear", "attention", "mlp"}),
        ("--set compute.fused=false", {"patch_embedding", "attention_complete", "mlp"}),
        ("--set compute.gradient_checkpointing=true", {"patch_embedding", "blocks"}),
    ],
)
@pytest.mark.slow_after_first(1)
def test_breakdown(options: str, parts: set[str], capsys: pytest.CaptureFixture[str]):
    tiny_setting = "--device cpu --threads 1 --batch 1 --prototypes 64 --locals 1 --steps 1 --warmup 1 --json"
    breakdown.main([*tiny_setting.split(), "--set", "backbone.depth=2", *options.split()])
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert row["share"].keys() == parts | {"head_mlp", "prototypes", "optimizer", "ema", "rest"}
    assert sum(row["share"].values()) == pytest.approx(100, abs=0.1)
    assert sum(row["share_of_flops"].values()) == pytest.approx(100, abs=0.1)
    assert all(share > 0 for name, share in row["share"].items() if name != "rest")
    assert "milliseconds" not in row


class Operations(TorchDispatchMode):
    """`FlopCounterMode` without its hooks on modules, which fail with `torch.autograd.grad`."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        self.total += count(*args, **(kwargs or {}), out_val=result) if count else 0
        return result


class Counted:
    """`step_parts` that also counts the operations of each part, and of a complete step."""

    def __init__(self) -> None:
        self.parts: dict[str, int] = {}
        self.step = 0

    def __call__(self, method: Any, crops: Any, setting: Setting) -> list[Part]:
        parts = step_parts(method, crops, setting)
        with sdpa_kernel(SDPBackend.MATH):
            for part in parts:
                with Operations() as operations:
                    part.run()
                self.parts[part.name] = self.parts.get(part.name, 0) + operations.total * part.times
            with Operations() as operations:
                method.loss(crops).backward()
        self.step = operations.total
        return parts


NARROW = ("backbone.depth=3", "backbone.width=32", "backbone.heads=2", "method.head_hidden_dim=64")


@pytest.mark.parametrize("fused", ["true", "false"])
@pytest.mark.slow
def test_the_parts_of_the_breakdown_make_a_step(fused: str, monkeypatch: pytest.MonkeyPatch):
    counted = Counted()
    monkeypatch.setattr(breakdown, "step_parts", counted)
    overrides = (*NARROW, f"compute.fused={fused}")
    setting = Setting("vit_tiny", batch=2, prototypes=64, local_crops=3, overrides=overrides)
    _, flops = breakdown.take_steps(setting, warmup=1, steps=1)
    # No part has the recomputed teacher logits of one crop, for the center.
    assert sum(counted.parts.values()) == pytest.approx(counted.step, rel=0.001)
    if fused == "true":
        return
    expected = {name: 2 * count for name, count in flops.items()}  # for two images
    assert counted.parts["attention_complete"] == expected["attention_linear"] + expected["attention"]
    assert counted.parts["mlp"] == expected["mlp"]
    assert counted.parts["prototypes"] == expected["prototypes"]
    # The gradient of the images is not computed.
    patches = {size: vit_flops(ViTConfig(width=32), image_size=size)["patch_embedding"] for size in (224, 96)}
    assert counted.parts["patch_embedding"] == expected["patch_embedding"] - 2 * (2 * patches[224] + 3 * patches[96])
    # PyTorch counts the 64 scalar products of length 256 in the gradient of the weight norm as matrix products.
    assert counted.parts["head_mlp"] == expected["head_mlp"] + 2 * 64 * 256
