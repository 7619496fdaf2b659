"""The parts of a training step, each on the networks that train, ready to run by itself.

A part of the student runs forward and backward, one of the teacher forward. M tokens of all crops, S crops, D width.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import torch
from step_windows import Setting
from torch import Tensor

from dino_lightning.losses.chunked import chunked_cross_view_entropy
from dino_lightning.losses.cross_view import cross_view_entropy
from dino_lightning.methods.base import GLOBAL_CROPS
from dino_lightning.methods.dino import DINO
from dino_lightning.models.factored_logits import FactoredLogits
from dino_lightning.models.kernels import block as whole_block
from dino_lightning.models.kernels.dense import dense, norm_dense
from dino_lightning.models.kernels.packing import attend, attend_in_one_call, first_tokens, pack
from dino_lightning.models.multi_crop import MultiCropNetwork
from dino_lightning.models.packed_block import _mlp
from dino_lightning.models.vit import OriginalViT
from dino_lightning.optim.ema import ema_update


@dataclass
class Part:
    """Something that a step does `times` times."""

    name: str
    run: Callable[[], Any]
    times: int = 1


@dataclass
class Maker:
    """Makes parts of one of the two networks."""

    network: MultiCropNetwork
    crops: list[Tensor]
    setting: Setting
    trains: bool

    def part(
        self, name: str, function: Callable[..., Any], *inputs: Tensor, times: int = 1, of: Iterable[Any] = ()
    ) -> Part:
        """`function(*inputs)`, and for the student the gradients of the inputs and of the parameters `of`."""
        leaves = [x.detach().requires_grad_(self.trains) for x in inputs]
        wanted = [*leaves, *(parameter for parameter in of if parameter.requires_grad)]
        towards: list[Tensor] = []

        def run() -> None:
            with torch.set_grad_enabled(self.trains):
                outputs = self.call(function, *leaves)
                if self.trains:
                    towards[:] = towards or [torch.ones_like(y) for y in outputs]
                    torch.autograd.grad(outputs, wanted, towards, allow_unused=True)

        return Part(name, run, times)

    def call(self, function: Callable[..., Any], *inputs: Tensor) -> list[Tensor]:
        """The tensors that the function makes in the step's precision."""
        with torch.autocast(self.setting.device, torch.bfloat16, enabled=self.setting.precision == "bf16"):
            outputs = function(*inputs)
        if isinstance(outputs, FactoredLogits):
            return [outputs.embeddings, outputs.prototypes]
        return outputs if isinstance(outputs, list) else [outputs]

    def values(self, function: Callable[..., Any], *inputs: Tensor) -> list[Tensor]:
        """The same without gradient."""
        with torch.no_grad():
            return self.call(function, *inputs)

    def fuses(self, backbone: OriginalViT) -> bool:
        """Whether its blocks are one function each."""
        block: Any = backbone.blocks[0]
        token_1D = torch.empty(1, block.norm1.weight.numel(), device=self.setting.device)
        with torch.autocast(self.setting.device, torch.bfloat16, enabled=self.setting.precision == "bf16"):
            return whole_block.available(token_1D, block)

    def features(self) -> Tensor:
        """Of all crops (S, D)."""
        return self.network.features(self.crops)

    def factors(self, features_SD: Tensor) -> FactoredLogits:
        """Bottlenecks and prototypes."""
        return self.network.head(features_SD, factored=True)


def step_parts(method: DINO, crops: list[Tensor], setting: Setting) -> list[Part]:
    """All parts; the method is attached to its trainer and has taken a step."""
    student = Maker(method.student, crops, setting, trains=True)
    teacher = Maker(method.teacher, crops[:GLOBAL_CROPS], setting, trains=False)
    parts: list[Part] = []
    for maker in (student, teacher):
        parts += backbone_parts(maker)
        (features_SD,) = maker.values(maker.features)
        parts.append(maker.part("head_mlp", maker.factors, features_SD, of=maker.network.head.parameters()))
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


def loss_part(method: DINO, student: Maker, teacher: Maker) -> Part:
    """From the bottlenecks to the loss."""
    embeddings_SD, prototypes_KD = student.values(lambda: student.factors(student.features()))
    target = FactoredLogits(*teacher.values(lambda: teacher.factors(teacher.features())))
    B, params = student.setting.batch, method._softmax_params(target)

    def loss(embeddings_SD: Tensor, prototypes_KD: Tensor) -> Tensor:
        own = FactoredLogits(embeddings_SD, prototypes_KD)
        if method.compute.fused:
            return chunked_cross_view_entropy(own, target, params, images=B, rows=method.compute.loss_rows)
        of_student, of_teacher = (logits.unflatten(0, (-1, B)) for logits in (own.logits(), target.logits()))
        return cross_view_entropy(of_student, of_teacher, params)

    return student.part("prototypes", loss, embeddings_SD, prototypes_KD)


def backbone_parts(maker: Maker) -> list[Part]:
    """Those of a ViT, or the backbone as a whole."""
    network, compute, backbone = maker.network, maker.network.compute, maker.network.backbone
    if not isinstance(backbone, OriginalViT):
        return [maker.part("network", maker.features, of=backbone.parameters())]
    batches = [torch.cat(list(run)) for _, run in groupby(maker.crops, key=lambda crop: crop.shape[-1])]
    embedding = [*backbone.patch_embed.parameters(), backbone.pos_embed, backbone.cls_token]
    if not network.packed:
        return [part for images in batches for part in plain_parts(maker, backbone, images, embedding)]
    # Compiled, computed again or fused, what happens inside a block is not the sum of its layers.
    whole = compute.compile or compute.gradient_checkpointing or maker.fuses(backbone)
    inside = block_parts if whole else layer_parts
    embed = maker.part("patch_embedding", lambda: embedded(backbone, batches)[0], of=embedding)
    return [embed, *inside(maker, backbone, batches)]


def embedded(backbone: OriginalViT, batches: list[Tensor]) -> tuple[Tensor, Any]:
    """Packed tokens (M, D) at the first block, and the shapes of the crops."""
    return pack(backbone._tokens(batches))


def layer_parts(maker: Maker, backbone: OriginalViT, batches: list[Tensor]) -> list[Part]:
    """Attention and MLPs over packed tokens; in the last block, behind the attention, the class tokens alone."""
    (x_MD,), shapes = maker.values(lambda: embedded(backbone, batches)[0]), embedded(backbone, batches)[1]
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

    (qkv_M3D,) = maker.values(qkv, x_MD)
    mixed, last_mixed = maker.values(attention, qkv_M3D), maker.values(last_attention, qkv_M3D)
    into_qkv, weights = [*block.norm1.parameters(), *layers.qkv.parameters()], list(layers.proj.parameters())
    into_mlp = [*block.norm2.parameters(), *block.mlp.parameters()]
    return [
        maker.part("attention_linear", qkv, x_MD, times=before + 1, of=into_qkv),
        maker.part("attention_linear", projection, *mixed, times=before, of=weights),
        maker.part("attention_linear", projection, *last_mixed, of=weights),
        maker.part("attention", attention, qkv_M3D, times=before),
        maker.part("attention", last_attention, qkv_M3D),
        maker.part("mlp", mlp, x_MD, times=before, of=into_mlp),
        maker.part("mlp", mlp, first_tokens(x_MD, shapes), of=into_mlp),
    ]


def block_parts(maker: Maker, backbone: OriginalViT, batches: list[Tensor]) -> list[Part]:
    """Whole blocks as the step runs them."""
    (x_MD,), shapes = maker.values(lambda: embedded(backbone, batches)[0]), embedded(backbone, batches)[1]
    blocks: list[Any] = list(backbone.blocks)
    drops = backbone._drops(shapes, x_MD.device)

    def run(x: Tensor, *, index: int) -> Tensor:
        return blocks[index](x, shapes=shapes, drop=drops[index], last=index + 1 == len(blocks))

    return [maker.part("blocks", partial(run, index=i), x_MD, of=block.parameters()) for i, block in enumerate(blocks)]


def plain_parts(maker: Maker, backbone: OriginalViT, images: Tensor, embedding: list[Any]) -> list[Part]:
    """timm's layers over the crops of one resolution."""
    block: Any = backbone.blocks[0]

    def embed() -> Tensor:
        return backbone._pos_embed(backbone.patch_embed(images))

    (x_BND,), times = maker.values(embed), len(backbone.blocks)
    into_attention = [*block.norm1.parameters(), *block.attn.parameters()]
    into_mlp = [*block.norm2.parameters(), *block.mlp.parameters()]
    return [
        maker.part("patch_embedding", embed, of=embedding),
        maker.part("attention_whole", lambda x: block.attn(block.norm1(x)), x_BND, times=times, of=into_attention),
        maker.part("mlp", lambda x: block.mlp(block.norm2(x)), x_BND, times=times, of=into_mlp),
    ]
