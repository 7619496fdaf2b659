"""Trains the original DINO and this package from the same weights on the same batches; prints the differences.

    python benchmarks/fidelity.py --original DIR            ViT, float64: 2 epochs of 5 steps, minutes on 2 CPU cores
    python benchmarks/fidelity.py --original DIR --dtype float32
    python benchmarks/fidelity.py --original DIR --backbone resnet50
    python benchmarks/fidelity.py --original DIR --batch 16             enough images for tiles
    python benchmarks/fidelity.py --original DIR --compute fused=false  with other settings of `compute`

DIR is a checkout of facebookresearch/dino (the figures in docs/fidelity.md: commit 7c446df). One side is the original's
`train_one_epoch`, with `.cuda()` doing nothing; the other is our LightningModule with Lightning's trainer. The settings
cover everything that changes during training: warm-up, schedules of weight decay and momentum, a teacher temperature
that differs between the epochs, a frozen last layer in the first epoch, gradient clipping with a low limit, an
unnormalized last layer.
"""

import argparse
import contextlib
import dataclasses
import io
import logging
import re
import sys
import types
from functools import partial
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from torch import Tensor, nn

from dino_lightning.config import AdamWConfig, ComputeConfig, DINOConfig, OptimConfig, SGDConfig, TimmConfig, ViTConfig
from dino_lightning.methods.dino import DINO
from dino_lightning.methods.parts import MethodParts
from dino_lightning.models.backbones import build_backbone

EPOCHS, STEPS, LOCAL_CROPS, PROTOTYPES = 2, 5, 2, 1024
GLOBAL_SIZE, LOCAL_SIZE, PATCH, WIDTH, DEPTH, HEADS = 224, 96, 16, 192, 12, 3
LR, CLIP, MOMENTUM = 0.02, 0.02, 0.9

Weights = dict[str, Tensor]


@dataclasses.dataclass
class Trace:
    """Losses, centers and weights of a run after each step."""

    losses: list[float] = dataclasses.field(default_factory=list)
    centers: list[Tensor] = dataclasses.field(default_factory=list)
    students: list[Weights] = dataclasses.field(default_factory=list)
    teachers: list[Weights] = dataclasses.field(default_factory=list)

    def record(self, student: nn.Module, teacher: nn.Module) -> None:
        """Copy the weights after a step."""
        for weights, module in ((self.students, student), (self.teachers, teacher)):
            weights.append({name: tensor.detach().clone() for name, tensor in module.state_dict().items()})


def main() -> None:
    """Run both sides and compare them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--original", type=Path, required=True, help="checkout of facebookresearch/dino")
    parser.add_argument("--dtype", choices=["float64", "float32"], default="float64")
    parser.add_argument("--backbone", choices=["vit", "resnet50"], default="vit")
    parser.add_argument("--batch", type=int, default=4, help="images; with 16 or more, a ViT's blocks run in tiles")
    parser.add_argument("--compute", nargs="*", default=[], metavar="KEY=VALUE", help="settings of `compute` for ours")
    options = parser.parse_args()
    compute = OmegaConf.merge(OmegaConf.structured(ComputeConfig), OmegaConf.from_dotlist(options.compute))
    dtype = getattr(torch, options.dtype)
    generator = torch.Generator().manual_seed(1)
    sizes = [GLOBAL_SIZE] * 2 + [LOCAL_SIZE] * LOCAL_CROPS
    batches = [
        [torch.randn(options.batch, 3, size, size, generator=generator, dtype=dtype) for size in sizes]
        for _ in range(EPOCHS * STEPS)
    ]
    torch.set_default_dtype(dtype)
    initial, original = run_original(options.original, batches, backbone=options.backbone)
    ours = run_ours(
        initial,
        batches,
        backbone=options.backbone,
        precision=options.dtype,
        compute=cast(ComputeConfig, OmegaConf.to_object(compute)),
    )
    torch.set_default_dtype(torch.float32)
    compare(initial, original, ours)


def run_original(checkout: Path, batches: list[list[Tensor]], *, backbone: str) -> tuple[Weights, Trace]:
    """The initial weights of the original's networks and the trace of its training loop."""
    sys.path.insert(0, str(checkout))
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
    torch.cuda.synchronize = lambda *_: None  # type: ignore[assignment]
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    import main_dino
    import utils
    import vision_transformer as vits

    utils.SmoothedValue.synchronize_between_processes = lambda self: None  # it needs a GPU, only to print a mean
    torch.manual_seed(0)
    with_norm = backbone == "resnet50"
    networks, width = _original_networks(vits, backbone)
    student = utils.MultiCropWrapper(
        networks[0], vits.DINOHead(width, PROTOTYPES, use_bn=with_norm, norm_last_layer=False)
    )
    teacher = utils.MultiCropWrapper(networks[1], vits.DINOHead(width, PROTOTYPES, with_norm))
    student = nn.parallel.DistributedDataParallel(student)
    teacher.load_state_dict(student.module.state_dict())
    for parameter in teacher.parameters():
        parameter.requires_grad = False
    initial = {name: tensor.clone() for name, tensor in student.module.state_dict().items()}

    loss = main_dino.DINOLoss(PROTOTYPES, 2 + LOCAL_CROPS, 0.04, 0.07, 2, EPOCHS)
    groups = utils.get_params_groups(student)
    optimizer = torch.optim.SGD(groups, lr=0, momentum=0.9) if with_norm else torch.optim.AdamW(groups)
    schedules = (
        utils.cosine_scheduler(LR * len(batches[0][0]) / 256, 1e-6, EPOCHS, STEPS, warmup_epochs=1),
        utils.cosine_scheduler(0.04, 0.4, EPOCHS, STEPS),
        utils.cosine_scheduler(MOMENTUM, 1, EPOCHS, STEPS),
    )
    trace = Trace()
    forward, update_center = loss.forward, loss.update_center

    def recorded_forward(*arguments: Any) -> Tensor:
        result = forward(*arguments)
        trace.losses.append(result.item())
        return result

    def recorded_update(output: Tensor) -> None:
        update_center(output)
        trace.centers.append(loss.center.clone())

    loss.forward, loss.update_center = recorded_forward, recorded_update
    arguments = types.SimpleNamespace(clip_grad=CLIP, freeze_last_layer=1, epochs=EPOCHS)
    for epoch in range(EPOCHS):
        loader = BatchesWithCallback(
            batches[epoch * STEPS :][:STEPS], after=lambda: trace.record(student.module, teacher)
        )
        with contextlib.redirect_stdout(io.StringIO()):
            main_dino.train_one_epoch(
                student, teacher, teacher, loss, loader, optimizer, *schedules, epoch, None, arguments
            )
    dist.destroy_process_group()
    return initial, trace


def _original_networks(vits: Any, backbone: str) -> tuple[list[nn.Module], int]:
    if backbone == "resnet50":
        from torchvision.models import resnet50

        return [resnet50(), resnet50()], 2048
    norm = partial(nn.LayerNorm, eps=1e-6)
    make = partial(
        vits.VisionTransformer, img_size=[GLOBAL_SIZE], patch_size=PATCH, embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS
    )
    return [make(qkv_bias=True, norm_layer=norm) for _ in range(2)], WIDTH


class BatchesWithCallback:
    """Yields batches and calls `after` when the training step on a batch is done."""

    def __init__(self, batches: list[list[Tensor]], *, after: Any) -> None:
        self.batches, self.after = batches, after

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Any:
        for batch in self.batches:
            yield batch, None
            self.after()


def run_ours(
    initial: Weights, batches: list[list[Tensor]], *, backbone: str, precision: str, compute: ComputeConfig
) -> Trace:
    """The trace of our LightningModule, trained from the same weights."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    optim: OptimConfig
    if backbone == "resnet50":
        network = TimmConfig(drop_path_rate=0.0, name="resnet50", arguments={"zero_init_last": False})
        optim = SGDConfig(lr=LR, lr_warmup="1ep", clip_grad=CLIP)
    else:
        network = ViTConfig(drop_path_rate=0.0, width=WIDTH, depth=DEPTH, heads=HEADS, patch_size=PATCH)
        optim = AdamWConfig(lr=LR, lr_warmup="1ep", clip_grad=CLIP)
    networks = [build_backbone(network, image_size=GLOBAL_SIZE, drop_path=False) for _ in range(2)]
    method = DINO(
        DINOConfig(
            out_dim=PROTOTYPES,
            head_batch_norm=backbone == "resnet50",
            norm_last_layer=False,
            teacher_temperature=0.07,
            teacher_temperature_warmup="2ep",
            teacher_momentum=MOMENTUM,
        ),
        MethodParts(
            networks[0],
            teacher_backbone=networks[1],
            feature_dim=networks[0].num_features,  # type: ignore[arg-type]
            optim=optim,
            batch_size_per_device=len(batches[0][0]),
            compute=compute,
        ),
    )
    method.student.load_state_dict(initial)
    method.teacher.load_state_dict(initial)
    trace = Trace()

    class RecordTrace(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            """Record the step."""
            trace.losses.append(outputs["loss"].item())
            trace.centers.append(method.center.center.clone())
            trace.record(method.student, method.teacher)

    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        precision="64-true" if precision == "float64" else "32-true",
        max_epochs=EPOCHS,
        callbacks=[RecordTrace()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        reload_dataloaders_every_n_epochs=1,
    )
    trainer.fit(method, datamodule=EpochBatches(batches))
    return trace


class EpochBatches(L.LightningDataModule):
    """Data with different batches for each epoch."""

    def __init__(self, batches: list[list[Tensor]]) -> None:
        super().__init__()
        self.batches = batches

    def train_dataloader(self) -> Any:
        """The batches of the current epoch."""
        epoch = self.trainer.current_epoch if self.trainer else 0
        batches: Any = self.batches[epoch * STEPS :][:STEPS]
        return torch.utils.data.DataLoader(batches, batch_size=None, num_workers=0)


def compare(initial: Weights, original: Trace, ours: Trace) -> None:
    """Print a row per step, then the largest differences of the run."""
    print("step    loss (original)  |d loss| |d center| |d student| |d teacher|")
    for step, loss in enumerate(original.losses):
        center = (original.centers[step] - ours.centers[step]).abs().max().item()
        student = max(difference(original.students[step], ours.students[step]).values())
        teacher = max(difference(original.teachers[step], ours.teachers[step]).values())
        loss_difference = abs(loss - ours.losses[step])
        print(f"{step:4d} {loss:18.12f} {loss_difference:9.1e} {center:10.1e} {student:11.1e} {teacher:11.1e}")
    last = difference(original.students[-1], ours.students[-1])
    moved = difference(original.students[-1], initial)
    print("\nlargest difference after the last step by parameter, blocks taken together (and how far it moved):")
    kinds: dict[str, tuple[float, float]] = {}
    for name, largest in last.items():
        kind = re.sub(r"(blocks|layer\d)\.\d+\.", r"\1.*.", name)
        previous = kinds.get(kind, (0.0, 0.0))
        kinds[kind] = max(previous[0], largest), max(previous[1], moved[name])
    for kind in sorted(kinds, key=kinds.__getitem__, reverse=True):
        print(f"  {kinds[kind][0]:.1e}  ({kinds[kind][1]:.1e})  {kind}")


def difference(a: Weights, b: Weights) -> dict[str, float]:
    """Name of a weight -> largest absolute difference."""
    assert a.keys() == b.keys()
    return {name: (a[name].double() - b[name].double()).abs().max().item() for name in a}


if __name__ == "__main__":
    main()
