"""Evaluations and their benchmarks: `eval`, and the options of `data` that only evaluations use."""

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
    """The evaluation; one of the classes below."""

    batch_size_per_device: Annotated[int, AtLeast(1)] = 256
    """Images per forward pass and device."""
    image_size: Annotated[int | None, AtLeast(1)] = None
    """Side of the network's input image (pixels); null uses the size with which the checkpoint was evaluated."""


@dataclass
class ClassificationEval(EvaluationConfig):
    """An evaluation on the center crops of labeled images."""

    image_resize: Annotated[int | None, AtLeast(2)] = None
    """Shorter side before the center crop (pixels); null keeps the checkpoint's ratio to `image_size`."""


@dataclass
class KNNEval(ClassificationEval):
    """Weighted k-NN classification (section 4.1)."""

    k: Annotated[list[int], Counts] = field(default_factory=lambda: [10, 20, 100, 200])
    """Numbers of neighbors, all evaluated in one pass; at most the number of images in the bank."""
    temperatures: Annotated[list[float], Positives] = field(default_factory=lambda: [0.07])
    """Temperatures of the votes exp(similarity / temperature), all evaluated in one pass."""
    n_per_class: Annotated[int | None, AtLeast(1)] = None
    """Training images per class in the bank, drawn by seed; null uses all."""
    bank: Annotated[int | None, AtLeast(1)] = None
    """Largest number of training images in the bank, drawn evenly by seed; null uses all."""
    queries: Annotated[int | None, AtLeast(1)] = None
    """Largest number of validation images used as queries, drawn evenly by seed; null uses all."""


@dataclass
class LinearEval(ClassificationEval):
    """A linear classifier on frozen features, trained as the original trains it (section 4.1)."""

    batch_size_per_device: Annotated[int, AtLeast(1)] = 128
    """Images per step and device."""
    n_last_blocks: Annotated[int, AtLeast(1)] = 4
    """Number of last blocks whose class tokens are the features: 4 for ViT-S, 1 for ViT-B. Networks without class token
    support only 1."""
    avgpool: bool = False
    """Add the mean of the last block's patch tokens, interleaved as in the original: true for ViT-B."""
    epochs: Annotated[int, AtLeast(1)] = 100
    """Number of passes over the training images."""
    lr: Annotated[float, Positive] = 0.001
    """Learning rate of the first epoch, per 256 images of the total batch; it follows a cosine to 0, epoch by epoch."""
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
    """Choices for the number of last blocks whose class tokens are the features."""
    avgpool: Annotated[list[bool], NotEmpty] = field(default_factory=lambda: [False, True])
    """Choices for adding the mean of the last block's patch tokens."""
    lrs: Annotated[list[float], Positives] = field(default_factory=lambda: [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0])
    """Choices for the learning rate of the first step, per 256 images."""
    epochs: Annotated[int, AtLeast(1)] = 20
    """Number of passes over the features."""
    classifier_batch_size: Annotated[int, AtLeast(1)] = 1024
    """Features per step."""
    holdout: Annotated[float, Range("a number above 0 and below 1", lambda value: 0 < value < 1)] = 0.1
    """Share of the training images that is held out to make the choice."""


@dataclass
class LogisticEval(ClassificationEval):
    """Logistic regression on frozen features, on all labels or a few (low-shot)."""

    shares: Annotated[list[float], Shares] = field(default_factory=lambda: [0.01, 0.1])
    """Shares of the labeled training images, drawn from each class by seed: 0.01 and 0.1 are the paper's."""
    splits: Annotated[int, AtLeast(1)] = 3
    """Number of draws of each share, with seeds `seed`, `seed` + 1, …; their mean and spread are reported."""
    solver: Annotated[str, OneOf("device", "sklearn")] = "device"
    """`device` uses L-BFGS in PyTorch, `sklearn` uses scikit-learn's L-BFGS on the CPU. Both have the same
    objective."""
    c: Annotated[list[float], Positives] = field(default_factory=lambda: [0.01, 0.1, 1.0, 10.0, 100.0])
    """Inverse strengths of the L2 penalty; the choice is made by cross-validation on the drawn training images."""
    max_iterations: Annotated[int, AtLeast(1)] = 1000
    """Largest number of L-BFGS iterations."""


@dataclass
class FinetuneEval(ClassificationEval):
    """Training of all weights with labels and DeiT's recipe; from scratch with `checkpoint=untrained:…`."""

    batch_size_per_device: Annotated[int, AtLeast(1)] = 128
    """Images per step and device."""
    epochs: Annotated[int, AtLeast(1)] = 100
    """Number of passes over the training images."""
    lr: Annotated[float, Positive] = 0.0005
    """Learning rate after the warm-up, per 512 images of the total batch."""
    lr_end: Annotated[float, AtLeast(0)] = 1e-6
    """Final learning rate of the cosine schedule (not scaled with the batch)."""
    warmup_epochs: Annotated[int, AtLeast(0)] = 5
    """Epochs of linear warm-up."""
    weight_decay: Annotated[float, AtLeast(0)] = 0.05
    """Weight decay of AdamW."""
    layer_decay: Annotated[float, Range("a number above 0 and up to 1", lambda value: 0 < value <= 1)] = 0.75
    """Factor of the learning rate from a block to the block below; 1 trains all alike (from scratch)."""
    drop_path_rate: Annotated[float, ShareBelowOne] = 0.1
    """Stochastic depth: drop probability of the last block."""
    label_smoothing: Annotated[float, ShareBelowOne] = 0.1
    """Share of a target that is spread over all classes."""
    mixup: Annotated[float, AtLeast(0)] = 0.8
    """Alpha of mixup's Beta distribution; 0 disables it."""
    cutmix: Annotated[float, AtLeast(0)] = 1.0
    """Alpha of CutMix's Beta distribution; 0 disables it."""
    auto_augment: str | None = "rand-m9-mstd0.5-inc1"
    """timm's name of the augmentation policy; null uses only crops and flips."""
    random_erasing: Annotated[float, Share] = 0.25
    """Probability of erasing a rectangle."""
    repeated_augmentation: Annotated[int, AtLeast(1)] = 1
    """Augmentations of each image in an epoch of unchanged length: with DeiT's 3, an epoch has a third of the
    images."""
    ema_decay: Annotated[float, ShareBelowOne] = 0.0
    """Decay of a moving average of the weights, which is also tested; 0 disables it (DeiT: 0.99996)."""
    val_every_n_epochs: Annotated[int, AtLeast(1)] = 1
    """Epochs between tests; the last epoch is always tested."""


@dataclass
class RetrievalEval(EvaluationConfig):
    """Landmark retrieval on revisited Oxford and Paris (table 3)."""

    batch_size_per_device: Annotated[int, AtLeast(1)] = 1
    """Images per forward pass; images keep their shapes, so a batch contains only images of one shape."""
    image_size: Annotated[int | None, AtLeast(1)] = 224
    """Longer side to which larger images are resized, as in the original (pixels)."""
    query_box: bool = False
    """Crop queries to the annotated box, as the benchmark requires; the original uses the whole image."""
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
    """Whitening with `data.whitening_path`: `original` uses the mean of database and queries but the covariance around
    0, `corrected` uses the covariance around the mean, `none` does no whitening."""
    top: Annotated[int, AtLeast(1)] = 20
    """Database images retrieved for each query."""


@dataclass
class VideoEval(EvaluationConfig):
    """Video object segmentation by propagating the first frame's mask (table 5)."""

    batch_size_per_device: Annotated[int, AtLeast(1)] = 4
    """Frames per forward pass."""
    image_size: Annotated[int | None, AtLeast(1)] = 480
    """Shorter side of a frame (pixels); the longer side is cut to a multiple of 64, as in the original."""
    last_frames: Annotated[int, AtLeast(0)] = 7
    """Number of previous frames from which labels are propagated, in addition to the first."""
    neighborhood: Annotated[int, AtLeast(0)] = 12
    """Largest distance of a source patch, in rows and in columns (patches); 0 sets no limit."""
    top: Annotated[int, AtLeast(1)] = 5
    """Number of source patches that determine the label of a patch."""
    temperature: Annotated[float, Positive] = 0.1
    """Temperature of exp(similarity / temperature)."""
    std_typo: bool = True
    """Normalize red by a standard deviation of 0.228, as the original does by mistake, instead of 0.229."""
    write_masks: bool = True
    """Write the predicted masks to the folder `masks/`."""


@dataclass
class AttentionEval(EvaluationConfig):
    """Attention of the class token as segmentation (figure 4), and as pictures (figure 1)."""

    batch_size_per_device: Annotated[int, AtLeast(1)] = 1
    """Images per forward pass."""
    image_size: Annotated[int | None, AtLeast(1)] = None
    """Shorter side (pixels; bicubic), before the image is cut to whole patches. null uses 480, but the training size
    for the built-in images, and for other training images if it is below 128."""
    masses: Annotated[list[float], Shares] = field(default_factory=lambda: [0.6, 0.8])
    """Shares of the attention that a mask contains."""
    pictures: Annotated[int, AtLeast(0)] = 8
    """Images on each sheet, drawn by seed; for a clip, this number of equally spaced frames."""
    pca: bool = True
    """Also color patch tokens by their first three principal components."""
    frames_per_second: Annotated[float, Positive] = 12.0
    """Frame rate of the video that is written for a clip."""


@dataclass
class NeighborsEval(ClassificationEval):
    """A picture of the nearest neighbors of some images."""

    queries: Annotated[list[int] | None, Range("one or more positions from 0", each(lambda value: value >= 0))] = None
    """Indices of the query images; null draws `random_queries` images by seed."""
    random_queries: Annotated[int, AtLeast(1)] = 10
    """Number of query images to draw if `queries` is null."""
    neighbors: Annotated[int, AtLeast(1)] = 8
    """Neighbors of each query in the picture."""


@dataclass
class BenchmarkData(ImagesConfig):
    """A benchmark on disk in its original layout."""

    path: Annotated[str, FilePath] = MISSING
    """Folder of the extracted benchmark."""
    num_workers: Annotated[int, AtLeast(0)] = 10
    """Number of loader processes per device; at most one per core."""


@dataclass
class RevisitedData(BenchmarkData):
    """Revisited Oxford or Paris: `NAME/gnd_NAME.pkl` and `NAME/jpg/*.jpg`."""

    name: Annotated[str, OneOf("roxford5k", "rparis6k")] = "roxford5k"
    """Name of the benchmark: revisited Oxford or Paris."""
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
    """2017 distinguishes objects; 2016 treats all objects of a frame as one."""
    split: Annotated[str, FilePath] = "val"
    """Name of the list of sequences."""
    resolution: Annotated[str, FilePath] = "480p"
    """Subfolder of `JPEGImages` and `Annotations`."""


@dataclass
class VOCData(BenchmarkData):
    """Pascal VOC: `JPEGImages`, `SegmentationClass`, and where it exists `ImageSets/Segmentation/SPLIT.txt`."""

    split: Annotated[str, FilePath] = "val"
    """Name of the list of images; without the list, all images with a mask are used."""


@dataclass
class PicturesData(BenchmarkData):
    """An image, a folder of images, or a clip, without labels."""

    path: Annotated[str, FilePath] = MISSING
    """An image, a folder of images, an animated GIF or WebP, or a video (`pip install av`)."""
    clip: bool | None = None
    """Whether the images of a folder are frames of a clip; null decides by equal sizes and consecutive numbers."""
