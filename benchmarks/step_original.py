"""The original's side of `step.py`."""

import sys
import types
from collections.abc import Iterable
from functools import partial
from importlib import import_module
from itertools import repeat
from typing import Any

import torch
import torch.distributed as dist
from step_batches import EPOCHS, Setting, TimedBatches, noise_crops
from torch import nn


def run_original(setting: Setting, batches: TimedBatches, *, checkout: str) -> None:
    """Run the original's training loop with its networks, loss, optimizer and schedules, as its `train_dino` does."""
    sys.path.insert(0, checkout)
    device = torch.device(setting.device)
    stand_in_for_a_gpu(device)
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high" if setting.precision == "tf32" else "highest")
    store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True)
    dist.init_process_group("nccl" if setting.device == "cuda" else "gloo", store=store, rank=0, world_size=1)
    main_dino, utils = import_module("main_dino"), import_module("utils")
    if setting.device == "cpu":
        utils.SmoothedValue.synchronize_between_processes = lambda self: None  # it needs a GPU, only to print a mean
    student, teacher, teacher_without_ddp = original_networks(setting, device)
    epochs = types.SimpleNamespace(clip_grad=3.0, freeze_last_layer=0, epochs=EPOCHS)
    loss = main_dino.DINOLoss(setting.prototypes, 2 + setting.local_crops, 0.04, 0.04, 0, EPOCHS).to(device)
    groups = utils.get_params_groups(student)
    optimizer: torch.optim.Optimizer
    if setting.convolutional:
        optimizer, lr, decays = torch.optim.SGD(groups, lr=0, momentum=0.9), 0.03, (1e-4, 1e-4)
    else:
        optimizer, lr, decays = torch.optim.AdamW(groups), 0.0005, (0.04, 0.4)
    length = len(batches)
    schedules = (
        utils.cosine_scheduler(lr * setting.batch / 256, 1e-6, EPOCHS, length, warmup_epochs=10),
        utils.cosine_scheduler(*decays, EPOCHS, length),
        utils.cosine_scheduler(0.996, 1, EPOCHS, length),
    )
    batches.source = original_batches(setting, main_dino)
    scaler = mixed_precision(setting)
    main_dino.train_one_epoch(
        student, teacher, teacher_without_ddp, loss, batches, optimizer, *schedules, 0, scaler, epochs
    )


def stand_in_for_a_gpu(device: torch.device) -> None:
    """On a CPU, let the original's calls of `.cuda()` and `synchronize()` do nothing."""
    if device.type == "cpu":
        torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
        torch.cuda.synchronize = lambda *_: None  # type: ignore[assignment]


def mixed_precision(setting: Setting) -> Any:
    """The gradient scaler that makes the original's loop use autocast, or None.

    The original only has float16. bfloat16 needs no scaling, so the scaler is disabled and autocast uses bfloat16.
    """
    if setting.precision != "bf16":
        return None
    torch.cuda.amp.autocast = lambda enabled: torch.autocast(setting.device, torch.bfloat16, enabled=enabled)  # type: ignore
    return torch.amp.GradScaler(setting.device, enabled=False)


def original_networks(setting: Setting, device: torch.device) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Student, teacher, and the teacher without its DDP wrapper."""
    utils, vits = import_module("utils"), import_module("vision_transformer")
    if setting.convolutional:
        import torchvision.models

        make = getattr(torchvision.models, setting.backbone)
        backbones, width = [make(), make()], make().fc.weight.shape[1]
    else:
        # The original has no ViT-L: use its class with that size.
        large = {"embed_dim": 1024, "depth": 24, "num_heads": 16, "mlp_ratio": 4, "qkv_bias": True}
        large["norm_layer"] = partial(nn.LayerNorm, eps=1e-6)
        make = getattr(vits, setting.backbone, None) or partial(vits.VisionTransformer, **large)
        backbones = [make(patch_size=setting.patch, drop_path_rate=rate) for rate in (0.1, 0.0)]
        width = backbones[0].embed_dim
    student, teacher = (
        utils.MultiCropWrapper(backbone, vits.DINOHead(width, setting.prototypes)).to(device) for backbone in backbones
    )
    parallel = partial(nn.parallel.DistributedDataParallel, device_ids=[0] if device.type == "cuda" else None)
    teacher_without_ddp = teacher
    if utils.has_batchnorms(student):
        if device.type == "cuda":  # on a CPU, DDP does not support SyncBatchNorm; with one process it equals batch norm
            student, teacher = (nn.SyncBatchNorm.convert_sync_batchnorm(network) for network in (student, teacher))
        teacher = parallel(teacher)
        teacher_without_ddp = teacher.module
    student = parallel(student)
    teacher_without_ddp.load_state_dict(student.module.state_dict())
    teacher.requires_grad_(False)
    return student, teacher, teacher_without_ddp


def original_batches(setting: Setting, main_dino: Any) -> Iterable[Any]:
    """Crops and labels from the original's loader over the folder, or noise."""
    if setting.data is None:
        return repeat((noise_crops(setting), torch.zeros(setting.batch, dtype=torch.long)))
    from torchvision.datasets import ImageFolder

    scales = ((0.14, 1.0), (0.05, 0.14)) if setting.convolutional else ((0.4, 1.0), (0.05, 0.4))
    augmentation = main_dino.DataAugmentationDINO(*scales, setting.local_crops)
    images = ImageFolder(setting.data, transform=augmentation)
    return torch.utils.data.DataLoader(
        images,
        sampler=torch.utils.data.DistributedSampler(images, shuffle=True),
        batch_size=setting.batch,
        num_workers=setting.workers,
        pin_memory=setting.device == "cuda",
        drop_last=True,
    )
