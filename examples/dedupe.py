"""Find near duplicates in a data set: images that were resized, mirrored or recompressed.

    python examples/dedupe.py                               built-in images and altered copies of some of them
    python examples/dedupe.py --path ~/photos --above 0.9

Two images are in one group if their similarity exceeds `--above`, or if both are similar to a third image. The script
uses mean patch tokens, because they describe the picture in more detail than the class token, for which two dogs are
similar.
"""

import io

import numpy as np
from common import directions, drawn, features_of, parser, save, square
from PIL import Image, ImageEnhance, ImageOps
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

from dino_lightning.report.pictures.sheets import grid_sheet

SHOWN = 12
"""Maximum number of groups in the picture, and of images per group."""


def main() -> None:
    """Compute features, find groups, and save the picture."""
    words = parser(__doc__, output="example-dedupe.png")
    words.add_argument("--above", type=float, default=0.95, help="similarity of duplicates, at most 1 (%(default)s)")
    options = words.parse_args()
    found = features_of(options, None if options.path else with_copies(drawn(120)), features="mean_patch")
    units_ND = directions(found.features)
    similar_NN = csr_array(units_ND @ units_ND.T > options.above)
    _, group_N = connected_components(similar_NN, directed=False)
    groups = [np.flatnonzero(group_N == group).tolist() for group in np.flatnonzero(np.bincount(group_N) > 1)]
    for group in groups:
        print("  ".join(found.names[row] for row in group))
    extra = sum(len(group) - 1 for group in groups)
    print(f"{len(groups)} groups of duplicates; {extra} of {len(found)} images are redundant")
    largest = sorted(groups, key=len, reverse=True)[:SHOWN]
    most = max(map(len, largest), default=1)
    rows = [[square(found.image(row)) for row in group[:SHOWN]] for group in largest]
    save(grid_sheet(rows, titles=["first", *["same?"] * (min(most, SHOWN) - 1)], width=96), options.output)


def with_copies(images: list[Image.Image]) -> list[Image.Image]:
    """Return the images, followed by a darker, a mirrored and a recompressed copy of every tenth image."""
    return [
        *images,
        *(copy for image in images[::10] for copy in (darker(image), ImageOps.mirror(image), saved(image))),
    ]


def darker(image: Image.Image) -> Image.Image:
    """Return the image with 90 % of its brightness."""
    return ImageEnhance.Brightness(image).enhance(0.9)


def saved(image: Image.Image) -> Image.Image:
    """Return the image recompressed as a JPEG of lower quality."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=70)
    return Image.open(file)


if __name__ == "__main__":
    main()
