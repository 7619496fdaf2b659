"""Find images that are unlike all others: broken scans, screenshots, images of the wrong folder.

    python examples/outliers.py                      built-in images and six outliers
    python examples/outliers.py --path ~/photos

An image is an outlier if its tenth nearest neighbor is far away. The script does not use the first neighbor, because a
few similar outliers would then hide each other.
"""

import numpy as np
from common import BUILTIN_SIZE, drawn, features_of, parser, save, square
from PIL import Image
from sklearn.neighbors import NearestNeighbors

from dino_lightning.report.pictures.sheets import grid_sheet

NEIGHBOR, PER_ROW, SHOWN = 10, 6, 18


def main() -> None:
    """Compute features and distances, and save the picture."""
    options = parser(__doc__, output="example-outliers.png").parse_args()
    found = features_of(options, None if options.path else [*drawn(120), *odd_ones()])
    near = NearestNeighbors(n_neighbors=min(NEIGHBOR + 1, len(found))).fit(found.features)  # each is its own nearest
    distance_N = near.kneighbors(found.features)[0][:, -1]
    order = np.argsort(-distance_N)[:SHOWN]
    for row in order:
        print(f"{distance_N[row]:.2f}  {found.names[row]}")
    cells = [square(found.image(row)) for row in order]
    rows = [cells[start : start + PER_ROW] for start in range(0, len(cells), PER_ROW)]
    save(grid_sheet(rows, titles=["oddest first", *[""] * (PER_ROW - 1)], width=96), options.output)


def odd_ones() -> list[Image.Image]:
    """Return six images that no camera takes: noise, stripes, blank pages."""
    dice, side = np.random.default_rng(0), BUILTIN_SIZE
    stripes = np.tile(np.arange(side) // 2 % 2 * 255, (side, 1))
    gray = [np.zeros((side, side)), np.full((side, side), 255), stripes, stripes.T, dice.integers(0, 256, (side, side))]
    colors = dice.integers(0, 256, (side, side, 3), dtype=np.uint8)
    return [*(Image.fromarray(values.astype(np.uint8)) for values in gray), Image.fromarray(colors)]


if __name__ == "__main__":
    main()
