"""Features of images as a step of scikit-learn: `DinoFeatures`.

    make_pipeline(DinoFeatures("outputs/RUN"), LogisticRegression()).fit(paths, labels)

N images, D features.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from dino_lightning.config import DataConfig
from dino_lightning.errors import UserError
from dino_lightning.evaluation.embedding.backbone import Backbone, load_backbone, usable_device
from dino_lightning.evaluation.embedding.inputs import ImageInput, as_image_list, given_source
from dino_lightning.evaluation.features.choice import FeatureKind
from dino_lightning.evaluation.features.extract import features_of_batches
from dino_lightning.evaluation.features.images import BROKEN, ViewedImages, center_view
from dino_lightning.models.frozen import check_size

try:
    from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
except ImportError as error:
    raise UserError(
        'DinoFeatures needs scikit-learn, which is not installed: pip install "dino-lightning[sklearn]".'
    ) from error


class DinoFeatures(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """Images -> features (N, D) float32 of a frozen network; `fit` learns nothing.

    Images are paths, PIL images, or arrays (H, W, C) uint8: a list, a column of a table, or an array (N, H, W, C). All
    must be readable, since each is a row. A copy, also in another process, has the parameters and loads the network
    anew; `Pipeline(memory=…)` keeps features from one fit to the next.
    """

    def __init__(
        self,
        checkpoint: str = "timm:vit_small_patch16_224.dino",
        *,
        checkpoint_key: str | None = None,
        features: str = "class",
        n_last_blocks: int = 1,
        image_size: int | None = None,
        batch_size: int = 64,
        num_workers: int = 0,
        device: str = "auto",
    ) -> None:
        """`checkpoint` and the others as in `embed`; `device` is `auto`, `cpu`, `cuda`, `cuda:1`, …"""
        self.checkpoint = checkpoint
        self.checkpoint_key = checkpoint_key
        self.features = features
        self.n_last_blocks = n_last_blocks
        self.image_size = image_size
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.device = device

    def fit(self, X: Any, y: Any = None) -> "DinoFeatures":
        """Load the network, so that a wrong parameter is said here. Raises `UserError`."""
        network = self._backbone().network
        check_size(network, self.image_size or network.size, key="image_size")
        return self

    def transform(self, X: Any) -> np.ndarray:
        """Features (N, D) float32 of N images. Raises `UserError` where one cannot be read."""
        images = as_image_list(X, key="X")
        backbone = self._backbone()
        if not images:
            return np.empty((0, self._n_features_out), dtype=np.float32)
        return self._features(images, backbone).numpy()

    def _features(self, images: Sequence[ImageInput], backbone: Backbone) -> torch.Tensor:
        network, device = backbone.network, usable_device(self.device)
        kind = FeatureKind(self.features, self.n_last_blocks)
        size = self.image_size or network.size
        check_size(network, size, key="image_size")  # `fit` need not have been called
        viewed = ViewedImages(
            given_source(images, network.channels),
            center_view(network, size=self.image_size),
            blank=(network.channels, size, size),
            config=DataConfig(channels=network.channels, max_bad_share=1.0),
        )
        starts = range(0, len(images), self.batch_size)
        batches = [range(start, min(start + self.batch_size, len(images))) for start in starts]
        found = list(
            features_of_batches(
                kind.of(backbone.backbone), viewed, batches=batches, num_workers=self.num_workers, device=device
            )
        )
        broken = (torch.cat([labels_B for _, labels_B in found]) == BROKEN).nonzero().flatten().tolist()
        if broken:
            viewed[broken[0]]  # for the reason: a loader process may have met it
            raise UserError(
                f"X: {len(broken)} of {len(images)} images cannot be read {viewed.bad.examples()}; leave them out."
            )
        return torch.cat([features_BD for features_BD, _ in found])

    def _backbone(self) -> Backbone:
        """The network of the present parameters, loaded once."""
        wanted = (self.checkpoint, self.checkpoint_key, self.device)
        kind = FeatureKind(self.features, self.n_last_blocks)
        kind.check()
        for name, value, least in (("batch_size", self.batch_size, 1), ("num_workers", self.num_workers, 0)):
            if value < least:
                raise UserError(f"{name}={value}: expected at least {least}.")
        loaded = getattr(self, "_loaded", None)
        if loaded is None or loaded[0] != wanted:
            loaded = wanted, load_backbone(self.checkpoint, key=self.checkpoint_key, device=self.device)
            self._loaded = loaded
        kind.check_network(loaded[1].network)
        return loaded[1]

    @property
    def _n_features_out(self) -> int:
        """Columns of the output, from which scikit-learn makes their names."""
        network = self._backbone().network
        if self.features == "mean_patch":  # before the layer that some networks have behind their pooling
            return int(network.backbone.num_features)  # type: ignore[arg-type]
        return network.width * self.n_last_blocks

    def __getstate__(self) -> dict[str, Any]:
        """Parameters alone: a pickle of an estimator carries no network."""
        state: Any = super().__getstate__()
        return {name: value for name, value in state.items() if name != "_loaded"}

    def __sklearn_is_fitted__(self) -> bool:
        return True

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.requires_fit = False
        tags.no_validation = True
        tags.input_tags.two_d_array = False
        tags.input_tags.string = True
        return tags
