"""TODO."""

import timm

from dino_lightning.errors import UserError, nearest


def check_timm_name(name: str) -> None:
    """Refuse a name that timm does not know."""
    if not timm.is_model(name):
        raise UserError(f"backbone.name={name} is not a network of timm {timm.__version__}; "
                        f"{nearest(name, timm.list_models())}")  # fmt: skip
