"""Features of images as a scikit-learn transformer: `DinoFeatures`.

    make_pipeline(DinoFeatures("outputs/RUN"), LogisticRegression()).fit(paths, labels)

N images, D features.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from dino_lightning.config import DataConfig
from dino_lightning.config.ranges import AtLeast
from dino_lightning.errors import UserError
from dino_lightning.evaluation.embedding.backbone import Backbone, load_backbone, usable_device
from dino_lightning.evaluation.embedding.checks import feature_spec
from dino_lightning.evaluation.embedding.inputs import ImageInput, as_image_list, input_source
from dino_lightning.evaluation.features.extract import extract_batches
from dino_lightning.evaluation.features.images import BROKEN, center_images
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
    must be readable, since each is a row. A copy, also in another process, loads the network again;
    `Pipeline(memory=…)` caches features between fits.
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
        """Load the network, so that wrong parameters raise `UserError` here."""
        network = self._backbone().network
        check_size(network, self.image_size or network.size, key="image_size")
        return self

    def transform(self, X: Any) -> np.ndarray:
        """Features (N, D) float32 of N images. Raises `UserError` if an image cannot be read."""
        images = as_image_list(X, key="X")
        backbone = self._backbone()
        if not images:
            return np.empty((0, self._n_features_out), dtype=np.float32)
        return self._features(images, backbone).numpy()

    def _features(self, images: Sequence[ImageInput], backbone: Backbone) -> torch.Tensor:
        network, device = backbone.network, usable_device(self.device)
        spec = feature_spec(self.features, self.n_last_blocks)
        check_size(network, self.image_size or network.size, key="image_size")  # `fit` may not have been called
        config = DataConfig(channels=network.channels, max_bad_share=1.0)
        source = input_source(images, network.channels)
        viewed = center_images(network, source, size=self.image_size, config=config)
        starts = range(0, len(images), self.batch_size)
        batches = [range(start, min(start + self.batch_size, len(images))) for start in starts]
        loading: dict[str, Any] = {"batches": batches, "num_workers": self.num_workers, "device": device}
        parts = list(extract_batches(spec.of(backbone.backbone), viewed, **loading))
        broken = (torch.cat([labels_B for _, labels_B in parts]) == BROKEN).nonzero().flatten().tolist()
        if broken:
            viewed[broken[0]]  # read it again for the reason, which may be in a loader process
            raise UserError(
                f"X: {len(broken)} of {len(images)} images cannot be read {viewed.bad.examples()}; leave them out."
            )
        return torch.cat([features_BD for features_BD, _ in parts])

    def _backbone(self) -> Backbone:
        """The network of the current parameters, loaded once."""
        parameters = (self.checkpoint, self.checkpoint_key, self.device)
        spec = feature_spec(self.features, self.n_last_blocks)
        AtLeast(1).check("batch_size", self.batch_size)
        AtLeast(0).check("num_workers", self.num_workers)
        loaded = getattr(self, "_loaded", None)
        if loaded is None or loaded[0] != parameters:
            loaded = parameters, load_backbone(self.checkpoint, key=self.checkpoint_key, device=self.device)
            self._loaded = loaded
        spec.check(loaded[1].network)
        return loaded[1]

    @property
    def _n_features_out(self) -> int:
        """The number of output columns, from which scikit-learn derives their names."""
        return feature_spec(self.features, self.n_last_blocks).width(self._backbone().network)

    def __getstate__(self) -> dict[str, Any]:
        """Only the parameters: a pickled estimator does not contain the network."""
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
