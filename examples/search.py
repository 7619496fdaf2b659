"""Search your photos by image: show the most similar images, nearest first.

python examples/search.py                                            some built-in images as queries among the others
python examples/search.py --path ~/photos --query cat.jpg dog.jpg
"""

import numpy as np
from common import directions, features_of, parser, save, square

from dino_lightning.report.pictures.sheets import neighbor_sheet

QUERIES, NEIGHBORS = 6, 8


def main() -> None:
    """Compute features and similarities, and save the picture."""
    words = parser(__doc__, output="example-search.png")
    words.add_argument("--query", nargs="+", metavar="FILE", help="query images; default: some images of the data set")
    options = words.parse_args()
    found = features_of(options)
    asked = features_of(options, options.query) if options.query else found
    some = np.random.default_rng(0).permutation(len(found))[:QUERIES]
    rows = some if asked is found else np.arange(len(asked))

    units_ND, queries_MD = directions(found.features), directions(asked.features, around=found.features)
    similarity_MN = queries_MD[rows] @ units_ND.T
    if asked is found:
        similarity_MN[np.arange(len(rows)), rows] = -np.inf  # an image does not match itself
    nearest_MK = np.argsort(-similarity_MN, axis=1)[:, : min(NEIGHBORS, len(found) - (asked is found))]
    for row, nearest in zip(rows, nearest_MK, strict=True):
        print(f"{asked.names[row]}: {found.names[nearest[0]]}")
    sheet = neighbor_sheet(
        [square(asked.image(row)) for row in rows],
        [[square(found.image(row)) for row in nearest] for nearest in nearest_MK],
        query_labels=[asked.labels[row] for row in rows] if asked.labels else None,
        neighbor_labels=[[found.labels[row] for row in nearest] for nearest in nearest_MK] if asked.labels else None,
    )
    save(sheet, options.output)


if __name__ == "__main__":
    main()
