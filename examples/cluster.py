"""Group images that look alike, without labels.

    python examples/cluster.py                                       the built-in images of 12 classes
    python examples/cluster.py --path ~/photos --clusters 20

The script runs k-means on L2-normalized features. Each row of the picture is a cluster, the most typical images first.
"""

import numpy as np
from common import directions, features_of, parser, save, square
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_mutual_info_score

from dino_lightning.report.pictures.sheets import grid_sheet

SHOWN = 10
"""Images per cluster in the picture."""


def main() -> None:
    """Compute features, cluster them, and save the picture."""
    words = parser(__doc__, output="example-cluster.png")
    words.add_argument("--clusters", type=int, default=12, help="number of clusters (%(default)s)")
    options = words.parse_args()
    found = features_of(options)
    units_ND = directions(found.features)
    model = KMeans(min(options.clusters, len(found)), n_init=5, random_state=0).fit(units_ND)
    distance_NK = model.transform(units_ND)
    rows = []
    for cluster in np.argsort(-np.bincount(model.labels_)):
        members = np.flatnonzero(model.labels_ == cluster)
        typical = members[np.argsort(distance_NK[members, cluster])]
        print(f"{len(members):4}  like {found.names[typical[0]]}")
        rows.append([square(found.image(row)) for row in typical[:SHOWN]])
    if found.labels and all(found.labels):
        agreement = adjusted_mutual_info_score(found.labels, model.labels_)
        print(f"Agreement with the labels: {agreement:.2f} (adjusted mutual information: 0 by chance, 1 if equal)")
    save(grid_sheet(rows, titles=["typical", *[""] * (SHOWN - 1)], width=96), options.output)


if __name__ == "__main__":
    main()
