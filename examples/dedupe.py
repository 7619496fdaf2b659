"""Find near duplicates in a data set: groups of images that show the same, resized, mirrored or saved once more.

    python examples/dedupe.py                               built-in images, with altered copies of some among them
    python examples/dedupe.py --path ~/photos --above 0.9

Two images are of one group if they are more similar than `--above`, or both similar to a third one. Mean patch tokens
tell more of the picture than the class token, for which two dogs are alike.
"""

import io

import numpy as np
from common import directions, drawn, features_of, parser, save, square
from PIL import Image, ImageEnhance, ImageOps
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

from dino_lightning.report.pictures.sheets import sheet_of

SHOWN = 12
"""Groups, and images of a group, in the picture."""


def main() -> None:
    """Features, groups, the picture."""
    words = parser(__doc__, output="example-dedupe.png")
    words.add_argument("--above", type=float, default=0.95, help="similarity of duplicates, up to 1 (%(default)s)")
    options = words.parse_args()
    found = features_of(options, None if options.path else with_copies(drawn(120)), features="mean_patch")
    units_ND = directions(found.features)
    similar_NN = csr_array(units_ND @ units_ND.T > options.above)
    _, group_N = connected_components(similar_NN, directed=False)
    groups = [np.flatnonzero(group_N == group).tolist() for group in np.flatnonzero(np.bincount(group_N) > 1)]
    for group in groups:
        print("  ".join(found.names[row] for row in group))
    extra = sum(len(group) - 1 for group in groups)
    print(f"{len(groups)} groups; without {extra} of {len(found)} images nothing would be double")
    largest = sorted(groups, key=len, reverse=True)[:SHOWN]
    most = max(map(len, largest), default=1)
    rows = [[square(found.image(row)) for row in group[:SHOWN]] for group in largest]
    save(sheet_of(rows, titles=["first", *["same?"] * (min(most, SHOWN) - 1)], size=(96, 96)), options.output)


def with_copies(images: list[Image.Image]) -> list[Image.Image]:
    """The images, and behind them a darker, a mirrored and a badly compressed copy of every tenth."""
    return [
        *images,
        *(copy for image in images[::10] for copy in (darker(image), ImageOps.mirror(image), saved(image))),
    ]


def darker(image: Image.Image) -> Image.Image:
    """With nine tenths of the brightness."""
    return ImageEnhance.Brightness(image).enhance(0.9)


def saved(image: Image.Image) -> Image.Image:
    """As a JPEG of low quality."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=70)
    return Image.open(file)


if __name__ == "__main__":
    main()
