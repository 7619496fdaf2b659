"""The parts of a training step as functions that run alone, on the networks in training.

A part of the student runs forward and backward, a part of the teacher only forward. Shapes: M tokens of all crops,
S crops, D width.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import torch
from step_batches import Setting
from torch import Tensor

from dino_lightning.losses.chunked import chunked_cross_view_entropy
from dino_lightning.losses.cross_view import cross_view_entropy
from dino_lightning.methods.base import GLOBAL_CROPS
from dino_lightning.methods.dino import DINO
from dino_lightning.models.factored_logits import FactoredLogits
from dino_lightning.models.kernels import block as block_kernel
from dino_lightning.models.kernels.dense import dense, norm_dense
from dino_lightning.models.kernels.packing import attend, attend_in_one_call, first_tokens, pack
from dino_lightning.models.multi_crop import MultiCropNetwork
from dino_lightning.models.packed_block import _mlp
from dino_lightning.models.vit import OriginalViT
from dino_lightning.optim.ema import ema_update


@dataclass
class Part:
    """A part that a step runs `times` times."""

    name: str
    run: Callable[[], Any]
    times: int = 1


@dataclass
class PartFactory:
    """Makes the parts of one of the two networks."""

    network: MultiCropNetwork
    crops: list[Tensor]
    setting: Setting
    trains: bool

    def part(
        self, name: str, function: Callable[..., Any], *inputs: Tensor, times: int = 1, of: Iterable[Any] = ()
    ) -> Part:
        """A part that runs `function(*inputs)`; for the student also the gradients for inputs and parameters `of`."""
        leaves = [x.detach().requires_grad_(self.trains) for x in inputs]
        with_gradient = [*leaves, *(parameter for parameter in of if parameter.requires_grad)]
        ones: list[Tensor] = []

        def run() -> None:
            with torch.set_grad_enabled(self.trains):
                outputs = self.call(function, *leaves)
                if self.trains:
                    ones[:] = ones or [torch.ones_like(y) for y in outputs]
                    torch.autograd.grad(outputs, with_gradient, ones, allow_unused=True)

        return Part(name, run, times)

    def call(self, function: Callable[..., Any], *inputs: Tensor) -> list[Tensor]:
        """The outputs of the function in the precision of the step."""
        with torch.autocast(self.setting.device, torch.bfloat16, enabled=self.setting.precision == "bf16"):
            outputs = function(*inputs)
        if isinstance(outputs, FactoredLogits):
            return [outputs.embeddings, outputs.prototypes]
        return outputs if isinstance(outputs, list) else [outputs]

    def values(self, function: Callable[..., Any], *inputs: Tensor) -> list[Tensor]:
        """The outputs of the function without gradient."""
        with torch.no_grad():
            return self.call(function, *inputs)

    def fuses(self, backbone: OriginalViT) -> bool:
        """Whether each block of the backbone is one autograd function."""
        block: Any = backbone.blocks[0]
        token_1D = torch.empty(1, block.norm1.weight.numel(), device=self.setting.device)
        with torch.autocast(self.setting.device, torch.bfloat16, enabled=self.setting.precision == "bf16"):
            return block_kernel.available(token_1D, block)

    def features(self) -> Tensor:
        """Features of all crops (S, D)."""
        return self.network.features(self.crops)

    def factors(self, features_SD: Tensor) -> FactoredLogits:
        """Bottleneck embeddings and prototypes."""
        return self.network.head(features_SD, factored=True)


def step_parts(method: DINO, crops: list[Tensor], setting: Setting) -> list[Part]:
    """All parts of a step of a method that is attached to its trainer and has taken a step."""
    student = PartFactory(method.student, crops, setting, trains=True)
    teacher = PartFactory(method.teacher, crops[:GLOBAL_CROPS], setting, trains=False)
    parts: list[Part] = []
    for factory in (student, teacher):
        parts += backbone_parts(factory)
        (features_SD,) = factory.values(factory.features)
        parts.append(factory.part("head_mlp", factory.factors, features_SD, of=factory.network.head.parameters()))
    optimizer: Any = method.trainer.optimizers[0]

    def update() -> None:
        method.configure_gradient_clipping(optimizer)
        optimizer.step()

    momentum = method.value("teacher_momentum")
    return [
        *parts,
        loss_part(method, student, teacher),
        Part("optimizer", update),
        Part("ema", lambda: ema_update(method.teacher, method.student, momentum=momentum)),
    ]


def loss_part(method: DINO, student: PartFactory, teacher: PartFactory) -> Part:
    """The part from the bottleneck embeddings to the loss."""
    embeddings_SD, prototypes_KD = student.values(lambda: student.factors(student.features()))
    target = FactoredLogits(*teacher.values(lambda: teacher.factors(teacher.features())))
    B, params = student.setting.batch, method._softmax_params(target)

    def loss(embeddings_SD: Tensor, prototypes_KD: Tensor) -> Tensor:
        student_logits = FactoredLogits(embeddings_SD, prototypes_KD)
        if method.compute.fused:
            return chunked_cross_view_entropy(student_logits, target, params, images=B, rows=method.compute.loss_rows)
        of_student, of_teacher = (logits.unflatten(0, (-1, B)) for logits in (student_logits.logits(), target.logits()))
        return cross_view_entropy(of_student, of_teacher, params)

    return student.part("prototypes", loss, embeddings_SD, prototypes_KD)


def backbone_parts(factory: PartFactory) -> list[Part]:
    """The parts of a ViT, or any other backbone as one part."""
    network, compute, backbone = factory.network, factory.network.compute, factory.network.backbone
    if not isinstance(backbone, OriginalViT):
        return [factory.part("network", factory.features, of=backbone.parameters())]
    batches = [torch.cat(list(run)) for _, run in groupby(factory.crops, key=lambda crop: crop.shape[-1])]
    embedding = [*backbone.patch_embed.parameters(), backbone.pos_embed, backbone.cls_token]
    if not network.packed:
        return [part for images in batches for part in timm_parts(factory, backbone, images, embedding)]
    # Compiled, checkpointed or fused blocks take another time than the sum of their layers.
    blocks_only = compute.compile or compute.gradient_checkpointing or factory.fuses(backbone)
    inside = block_parts if blocks_only else layer_parts
    embed = factory.part("patch_embedding", lambda: embedded(backbone, batches)[0], of=embedding)
    return [embed, *inside(factory, backbone, batches)]


def embedded(backbone: OriginalViT, batches: list[Tensor]) -> tuple[Tensor, Any]:
    """Packed tokens (M, D) before the first block, and the shapes of the crops."""
    return pack(backbone._tokens(batches))


def layer_parts(factory: PartFactory, backbone: OriginalViT, batches: list[Tensor]) -> list[Part]:
    """Attention and MLPs over packed tokens; after the attention of the last block, only over the class tokens."""
    (x_MD,), shapes = factory.values(lambda: embedded(backbone, batches)[0]), embedded(backbone, batches)[1]
    block: Any = backbone.blocks[0]
    layers, before = block.attn, len(backbone.blocks) - 1
    mix = attend_in_one_call if block.attention == "varlen" else attend

    def qkv(x: Tensor) -> Tensor:
        return norm_dense(x, block.norm1, layers.qkv)

    def attention(x: Tensor) -> Any:
        return mix(x, shapes, heads=layers.num_heads)

    def last_attention(x: Tensor) -> Any:
        return attend(x, shapes, heads=layers.num_heads, first_only=True)

    def projection(*mixed: Tensor) -> list[Tensor]:
        return [dense(x, layers.proj) for x in mixed]

    def mlp(x: Tensor) -> Tensor:
        return _mlp(block, x, shapes)

    (qkv_M3D,) = factory.values(qkv, x_MD)
    mixed, last_mixed = factory.values(attention, qkv_M3D), factory.values(last_attention, qkv_M3D)
    into_qkv, weights = [*block.norm1.parameters(), *layers.qkv.parameters()], list(layers.proj.parameters())
    into_mlp = [*block.norm2.parameters(), *block.mlp.parameters()]
    return [
        factory.part("attention_linear", qkv, x_MD, times=before + 1, of=into_qkv),
        factory.part("attention_linear", projection, *mixed, times=before, of=weights),
        factory.part("attention_linear", projection, *last_mixed, of=weights),
        factory.part("attention", attention, qkv_M3D, times=before),
        factory.part("attention", last_attention, qkv_M3D),
        factory.part("mlp", mlp, x_MD, times=before, of=into_mlp),
        factory.part("mlp", mlp, first_tokens(x_MD, shapes), of=into_mlp),
    ]


def block_parts(factory: PartFactory, backbone: OriginalViT, batches: list[Tensor]) -> list[Part]:
    """Each block as one part, as the step runs it."""
    (x_MD,), shapes = factory.values(lambda: embedded(backbone, batches)[0]), embedded(backbone, batches)[1]
    blocks: list[Any] = list(backbone.blocks)
    drops = backbone._drops(shapes, x_MD.device)

    def run(x: Tensor, *, index: int) -> Tensor:
        return blocks[index](x, shapes=shapes, drop=drops[index], last=index + 1 == len(blocks))

    return [
        factory.part("blocks", partial(run, index=i), x_MD, of=block.parameters()) for i, block in enumerate(blocks)
    ]


def timm_parts(factory: PartFactory, backbone: OriginalViT, images: Tensor, embedding: list[Any]) -> list[Part]:
    """The parts of timm's layers over the crops of one resolution."""
    block: Any = backbone.blocks[0]

    def embed() -> Tensor:
        return backbone._pos_embed(backbone.patch_embed(images))

    (x_BND,), times = factory.values(embed), len(backbone.blocks)
    into_attention = [*block.norm1.parameters(), *block.attn.parameters()]
    into_mlp = [*block.norm2.parameters(), *block.mlp.parameters()]
    return [
        factory.part("patch_embedding", embed, of=embedding),
        factory.part("attention_complete", lambda x: block.attn(block.norm1(x)), x_BND, times=times, of=into_attention),
        factory.part("mlp", lambda x: block.mlp(block.norm2(x)), x_BND, times=times, of=into_mlp),
    ]
