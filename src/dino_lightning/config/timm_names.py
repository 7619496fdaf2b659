"""Checks that timm has a network of a given name."""

import timm

from dino_lightning.errors import UserError, did_you_mean


def check_timm_name(name: str) -> None:
    """Refuse a name that timm does not know."""
    if not timm.is_model(name):
        raise UserError(
            f"backbone.name={name} is not a network of timm {timm.__version__}; "
            f"{did_you_mean(name, timm.list_models())}"
        )
