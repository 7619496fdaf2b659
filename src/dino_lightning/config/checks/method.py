"""What the settings of `method` ask of network, crops and data."""

from collections.abc import Callable
from typing import Any

from dino_lightning.config import (
    ComputeConfig,
    DINOConfig,
    MethodConfig,
    MoCoConfig,
    TrainConfig,
    ViTConfig,
)
from dino_lightning.config.dotted import format_value, get_dotted
from dino_lightning.errors import UserError

IDLE_UNLESS: dict[str, tuple[str, Callable[[Any], bool], str]] = {
    "method.center_momentum": ("method.centering", lambda value: value == "center", "center"),
    "method.sinkhorn_iterations": ("method.centering", lambda value: value == "sinkhorn", "sinkhorn"),
    "method.mask_p": ("method.patch_loss_weight", lambda value: value > 0, "1"),
    "method.mask_share": ("method.patch_loss_weight", lambda value: value > 0, "1"),
    "method.queue_start": ("method.queue_length", lambda value: value > 0, "3840"),
}
"""A key that does nothing -> the setting that it waits for, whether that is met, and a value that meets it."""


def check_method(config: TrainConfig) -> None:
    """Refuse settings that this method could not keep, or would not look at."""
    for key, (other, is_met, value) in IDLE_UNLESS.items():
        known = get_dotted(config, key)
        if known is not None and known != _default(config.method, key) and not is_met(get_dotted(config, other)):
            raise UserError(
                f"{key}={format_value(known)} does nothing with {other}={format_value(get_dotted(config, other))}; set "
                f"{other}={value}, or leave {key} alone."
            )
    method, rows = config.method, config.compute.loss_rows
    if isinstance(method, DINOConfig) and method.patch_loss_weight and not isinstance(config.backbone, ViTConfig):
        raise UserError(
            f"method.patch_loss_weight={method.patch_loss_weight} masks patches, which only this package's own ViTs "
            "know; set backbone=vit_small or method.patch_loss_weight=0."
        )
    if not isinstance(method, DINOConfig) and rows != ComputeConfig.loss_rows:
        raise UserError(
            f"compute.loss_rows={rows} counts rows of DINO's logits, and the method is another one; leave "
            f"compute.loss_rows={ComputeConfig.loss_rows}."
        )
    patches = get_dotted(config, "backbone.patch_size")
    if isinstance(method, MoCoConfig) and method.freeze_patch_embedding and patches is None:
        raise UserError("method.freeze_patch_embedding=true: this network has no patches; set it to false.")


def _default(method: MethodConfig, key: str) -> Any:
    return getattr(type(method)(), key.removeprefix("method."))
