"""What is measured and on which benchmark: `eval`, and the options of `data` that only evaluation knows."""

from dataclasses import dataclass, field
from typing import Annotated

from omegaconf import MISSING

from dino_lightning.config.data import ImagesConfig
from dino_lightning.config.ranges import (
    AtLeast,
    Counts,
    FilePath,
    NotEmpty,
    OneOf,
    Positive,
    Positives,
    Range,
    Share,
    ShareBelowOne,
    Shares,
    each,
)


@dataclass
class EvaluationConfig:
    """What is measured; one of the children below."""

    batch_size_per_device: Annotated[int, AtLeast(1)] = 256
    """Images per forward pass and device."""
    image_size: Annotated[int | None, AtLeast(1)] = None
    """Side of the image that the network sees (pixels); null takes what the checkpoint was evaluated with."""


@dataclass
class ClassificationEval(EvaluationConfig):
    """An evaluation on labeled images, of which the network sees the center."""

    image_resize: Annotated[int | None, AtLeast(2)] = None
    """Shorter side before the center crop (pixels); null keeps the checkpoint's ratio to `image_size`."""


@dataclass
class KNNEval(ClassificationEval):
    """Weighted k-NN classification (section 4.1)."""

    k: Annotated[list[int], Counts] = field(default_factory=lambda: [10, 20, 100, 200])
    """Numbers of neighbors, all from one pass; none may be above the number of images in the bank."""
    temperatures: Annotated[list[float], Positives] = field(default_factory=lambda: [0.07])
    """Temperatures of the votes exp(similarity / temperature), all from one pass."""
    n_per_class: Annotated[int | None, AtLeast(1)] = None
    """Training images of each class in the bank, drawn by seed; null takes all."""
    bank: Annotated[int | None, AtLeast(1)] = None
    """Most training images in the bank, drawn evenly by seed; null takes all."""
    queries: Annotated[int | None, AtLeast(1)] = None
    """Most validation images asked about, drawn evenly by seed; null takes all."""


@dataclass
class LinearEval(ClassificationEval):
    """A linear classifier on frozen features, trained as the original trains it (section 4.1)."""

    batch_size_per_device: Annotated[int, AtLeast(1)] = 128
    """Images per step and device."""
    n_last_blocks: Annotated[int, AtLeast(1)] = 4
    """Class tokens of this many last blocks are the features: 4 for ViT-S, 1 for ViT-B.
    Networks without class token take 1 alone."""
    avgpool: bool = False
    """Add the mean of the last block's patch tokens, interleaved as in the original: true for ViT-B."""
    epochs: Annotated[int, AtLeast(1)] = 100
    """Passes over the training images."""
    lr: Annotated[float, Positive] = 0.001
    """Learning rate of the first epoch, per 256 images of the total batch; a cosine takes it to 0, once per epoch."""
    val_every_n_epochs: Annotated[int, AtLeast(1)] = 1
    """Epochs between tests; the last epoch is always tested."""
    classifier: Annotated[str | None, FilePath] = None
    """Path of a trained classifier to test instead of training one: the original's, a published one, or our own."""


@dataclass
class LinearGridEval(ClassificationEval):
    """Linear classifiers for a grid of learning rates and features, all at once on one pass of the backbone.

    The choice among them is made on held-out training images.
    """

    n_last_blocks: Annotated[list[int], Counts] = field(default_factory=lambda: [1, 4])
    """Class tokens of this many last blocks: the choices."""
    avgpool: Annotated[list[bool], NotEmpty] = field(default_factory=lambda: [False, True])
    """Without and with the mean of the last block's patch tokens: the choices."""
    lrs: Annotated[list[float], Positives] = field(default_factory=lambda: [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0])
    """Learning rates of the first step, per 256 images: the choices."""
    epochs: Annotated[int, AtLeast(1)] = 20
    """Passes over the features."""
    classifier_batch_size: Annotated[int, AtLeast(1)] = 1024
    """Features per step."""
    holdout: Annotated[float, Range("a number above 0 and below 1", lambda value: 0 < value < 1)] = 0.1
    """Share of the training images on which the choice is made (0 to 1)."""


@dataclass
class LogisticEval(ClassificationEval):
    """Logistic regression on frozen features, on all labels or a few (low-shot)."""

    shares: Annotated[list[float], Shares] = field(default_factory=lambda: [0.01, 0.1])
    """Shares of the labeled training images, drawn from each class by seed: 0.01 and 0.1 are the paper's."""
    splits: Annotated[int, AtLeast(1)] = 3
    """Draws of each share, with seeds `seed`, `seed` + 1, …; the mean and the spread are reported."""
    solver: Annotated[str, OneOf("device", "sklearn")] = "device"
    """`device`: L-BFGS in PyTorch; `sklearn`: scikit-learn's L-BFGS on the CPU. Same objective."""
    c: Annotated[list[float], Positives] = field(default_factory=lambda: [0.01, 0.1, 1.0, 10.0, 100.0])
    """Inverse strengths of the L2 penalty; the choice is made by cross-validation on the drawn training images."""
    max_iterations: Annotated[int, AtLeast(1)] = 1000
    """Most iterations of L-BFGS."""


@dataclass
class FinetuneEval(ClassificationEval):
    """All weights trained with labels by the recipe of DeiT; from scratch with `checkpoint=untrained:…`."""

    batch_size_per_device: Annotated[int, AtLeast(1)] = 128
    """Images per step and device."""
    epochs: Annotated[int, AtLeast(1)] = 100
    """Passes over the training images."""
    lr: Annotated[float, Positive] = 0.0005
    """Learning rate after the warm-up, per 512 images of the total batch."""
    lr_end: Annotated[float, AtLeast(0)] = 1e-6
    """Learning rate that the cosine goes towards (not scaled)."""
    warmup_epochs: Annotated[int, AtLeast(0)] = 5
    """Epochs of linear warm-up."""
    weight_decay: Annotated[float, AtLeast(0)] = 0.05
    """Weight decay of AdamW."""
    layer_decay: Annotated[float, Range("a number above 0 and up to 1", lambda value: 0 < value <= 1)] = 0.75
    """Factor on the learning rate from one block to the one below; 1 for all alike (from scratch)."""
    drop_path_rate: Annotated[float, ShareBelowOne] = 0.1
    """Stochastic depth, probability at the last block (0 to 1)."""
    label_smoothing: Annotated[float, ShareBelowOne] = 0.1
    """Share of a target spread over all classes (0 to 1)."""
    mixup: Annotated[float, AtLeast(0)] = 0.8
    """Alpha of mixup's Beta distribution; 0 turns it off."""
    cutmix: Annotated[float, AtLeast(0)] = 1.0
    """Alpha of CutMix's Beta distribution; 0 turns it off."""
    auto_augment: str | None = "rand-m9-mstd0.5-inc1"
    """timm's name of the augmentation policy; null for crops and flips alone."""
    random_erasing: Annotated[float, Share] = 0.25
    """Probability of erasing a rectangle (0 to 1)."""
    repeated_augmentation: Annotated[int, AtLeast(1)] = 1
    """Augmentations of an image in an epoch, whose length stays: with DeiT's 3 it shows a third of the images."""
    ema_decay: Annotated[float, ShareBelowOne] = 0.0
    """Decay of a moving average of the weights, which is tested too; 0 turns it off (DeiT: 0.99996)."""
    val_every_n_epochs: Annotated[int, AtLeast(1)] = 1
    """Epochs between tests; the last epoch is always tested."""


@dataclass
class RetrievalEval(EvaluationConfig):
    """Landmark retrieval on revisited Oxford and Paris (table 3)."""

    batch_size_per_device: Annotated[int, AtLeast(1)] = 1
    """Images per forward pass; images keep their shapes, so larger batches form only of equal ones."""
    image_size: Annotated[int | None, AtLeast(1)] = 224
    """Longer side (pixels): larger images are shrunk to it, as in the original."""
    query_box: bool = False
    """Cut queries to the annotated box, the benchmark's rule; the original uses the whole image."""
    scales: Annotated[list[float], Positives] = field(default_factory=lambda: [1.0])
    """Scales whose features are averaged; the original's multi-scale is [1, 0.7071, 0.5]."""
    whitening: bool = False
    """Whiten the features by PCA, learned on `data.whitening_path`."""


@dataclass
class CopyDetectionEval(EvaluationConfig):
    """Copy detection on Copydays (table 4)."""

    batch_size_per_device: Annotated[int, AtLeast(1)] = 16
    """Images per forward pass and device."""
    image_size: Annotated[int | None, AtLeast(1)] = 320
    """Side of the square to which images are resized (pixels)."""
    gem_power: Annotated[float, Positive] = 4.0
    """Exponent of the generalized mean over patch tokens."""
    whitening: Annotated[str, OneOf("none", "original", "corrected")] = "original"
    """With `data.whitening_path`: `original` takes the mean from database and queries but the covariance around 0,
    `corrected` the covariance around the mean; `none`."""
    top: Annotated[int, AtLeast(1)] = 20
    """Database images retrieved for each query; the original's 20."""


@dataclass
class VideoEval(EvaluationConfig):
    """Video object segmentation by propagating the first frame's mask (table 5)."""

    batch_size_per_device: Annotated[int, AtLeast(1)] = 4
    """Frames per forward pass."""
    image_size: Annotated[int | None, AtLeast(1)] = 480
    """Shorter side of a frame (pixels); the longer is cut to a multiple of 64, as in the original."""
    last_frames: Annotated[int, AtLeast(0)] = 7
    """Previous frames that labels come from, besides the first."""
    neighborhood: Annotated[int, AtLeast(0)] = 12
    """Largest distance of a source patch, in rows and in columns (patches); 0 for no limit."""
    top: Annotated[int, AtLeast(1)] = 5
    """Source patches that a patch takes its label from."""
    temperature: Annotated[float, Positive] = 0.1
    """Temperature of exp(similarity / temperature)."""
    std_typo: bool = True
    """Normalize red by a standard deviation of 0.228, as the original does by mistake, instead of 0.229."""
    write_masks: bool = True
    """Write the predicted masks to `masks/`."""


@dataclass
class AttentionEval(EvaluationConfig):
    """Attention of the class token as segmentation (figure 4), and as pictures (figure 1)."""

    batch_size_per_device: Annotated[int, AtLeast(1)] = 1
    """Images per forward pass."""
    image_size: Annotated[int | None, AtLeast(1)] = None
    """Shorter side (pixels; bicubic), then cut to whole patches. null: 480, but what the network was trained on for the
    built-in images, and for other training images where that is less than 128."""
    masses: Annotated[list[float], Shares] = field(default_factory=lambda: [0.6, 0.8])
    """Shares of the attention that a mask keeps (0 to 1)."""
    pictures: Annotated[int, AtLeast(0)] = 8
    """Images on each sheet, drawn by seed; of a clip, as many frames at equal distances."""
    pca: bool = True
    """Color patch tokens by their first three principal components, too."""
    frames_per_second: Annotated[float, Positive] = 12.0
    """Speed of the video that a clip becomes."""


@dataclass
class NeighborsEval(ClassificationEval):
    """A picture of the nearest neighbors of some images."""

    queries: Annotated[list[int] | None, Range("one or more positions from 0", each(lambda value: value >= 0))] = None
    """Positions of the query images; null draws `random_queries` by seed."""
    random_queries: Annotated[int, AtLeast(1)] = 10
    """Query images drawn where `queries` names none."""
    neighbors: Annotated[int, AtLeast(1)] = 8
    """Neighbors shown for each."""


@dataclass
class BenchmarkData(ImagesConfig):
    """A benchmark on disk in its own layout."""

    path: Annotated[str, FilePath] = MISSING
    """Folder of the benchmark as it unpacks."""
    num_workers: Annotated[int, AtLeast(0)] = 10
    """Loader processes per device; at most one for each core."""


@dataclass
class RevisitedData(BenchmarkData):
    """Revisited Oxford or Paris: `NAME/gnd_NAME.pkl` and `NAME/jpg/*.jpg`."""

    name: Annotated[str, OneOf("roxford5k", "rparis6k")] = "roxford5k"
    """`roxford5k` or `rparis6k`."""
    whitening_path: Annotated[str | None, FilePath] = None
    """Folder of images from which whitening is learned."""


@dataclass
class CopydaysData(BenchmarkData):
    """Copydays: `original/`, `strong/`, and where they exist `jpegqual/*` and `crops/*`."""

    distractors_path: Annotated[str | None, FilePath] = None
    """Folder of images added to the database (the paper: 10,000 of YFCC100M)."""
    whitening_path: Annotated[str | None, FilePath] = None
    """Folder of images from which whitening is learned (the paper: 20,000 of YFCC100M)."""


@dataclass
class DavisData(BenchmarkData):
    """DAVIS: `JPEGImages/480p`, `Annotations/480p`, `ImageSets/YEAR/SPLIT.txt`."""

    year: int = 2017
    """2017: objects apart; 2016: one object, all of them together."""
    split: Annotated[str, FilePath] = "val"
    """List of sequences."""
    resolution: Annotated[str, FilePath] = "480p"
    """Folder below `JPEGImages` and `Annotations`."""


@dataclass
class VOCData(BenchmarkData):
    """Pascal VOC: `JPEGImages`, `SegmentationClass`, and where it exists `ImageSets/Segmentation/SPLIT.txt`."""

    split: Annotated[str, FilePath] = "val"
    """List of images; without the list, all that have a mask."""


@dataclass
class PicturesData(BenchmarkData):
    """An image, a folder of images, or a clip, to look at."""

    path: Annotated[str, FilePath] = MISSING
    """An image, a folder of images, an animated GIF or WebP, or a video (`pip install av`)."""
    clip: bool | None = None
    """Whether a folder's images are the frames of a clip; null says so of images of one size, numbered one by one."""
