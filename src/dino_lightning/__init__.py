"""DINO: self-distillation with no labels, on PyTorch Lightning and Hydra.

    from dino_lightning import load_backbone, embed, DinoFeatures

Each name is imported when it is first used, so `import dino_lightning` alone takes no time.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dino_lightning.cli.compose import compose
    from dino_lightning.evaluation.embedding.backbone import load_backbone
    from dino_lightning.evaluation.embedding.embed import embed
    from dino_lightning.evaluation.embedding.sklearn import DinoFeatures

__version__ = "0.1.0"
__all__ = ["DinoFeatures", "compose", "embed", "load_backbone"]

_MODULES = {
    "DinoFeatures": "evaluation.embedding.sklearn",
    "compose": "cli.compose",
    "embed": "evaluation.embedding.embed",
    "load_backbone": "evaluation.embedding.backbone",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = found  # the next time without this function
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
