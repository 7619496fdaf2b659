"""Compares our scores with those of the official packages for the same inputs; prints the largest differences.

    python benchmarks/scores.py --revisitop DIR --truth DIR            average precision with the real ground truth
    python benchmarks/scores.py --original DIR                         Copydays' average precision, whitening
    python benchmarks/scores.py --davis2017 DIR --data DAVIS           J and F (needs OpenCV and scikit-image)
    python benchmarks/scores.py --davis2017 DIR --data DAVIS --masks OUTPUT/masks     for masks written by dino eval

Each DIR is a checkout: filipradenovic/revisitop, facebookresearch/dino, davisvideochallenge/davis2017-evaluation.
`--truth` is the folder with `roxford5k/` and `rparis6k/` and their `gnd_*.pkl`. Rankings are random, every second one
with ties. Without `--masks`, the evaluated masks are the true masks of five frames earlier.
"""

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dino_lightning.data.benchmarks.revisited import load_data_pickle
from dino_lightning.evaluation.retrieval.ranking import average_precision_at_top, rank_database
from dino_lightning.evaluation.retrieval.whitening import learn_whitening
from dino_lightning.evaluation.video.davis_scores import object_scores

LEVELS = {
    "medium": (("easy", "hard"), ("junk",)),
    "hard": (("hard",), ("junk", "easy")),
    "easy": (("easy",), ("junk", "hard")),
}
AT = (1, 5, 10)


def main() -> None:
    """Run the comparisons for the given checkouts."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name in ("revisitop", "truth", "original", "davis2017", "data", "masks"):
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--rankings", type=int, default=10, help="random rankings for each data set and level")
    options = parser.parse_args()
    if not (options.revisitop or options.original or options.davis2017):
        parser.error("set at least one of --revisitop, --original, --davis2017")
    if options.revisitop:
        retrieval(options)
    if options.original:
        copies(options)
    if options.davis2017:
        video(options)


def imported(folder: Path, module: str) -> Any:
    """Import a module from a checkout."""
    if not hasattr(np, "in1d"):  # NumPy 2.4 renamed it
        np.in1d = np.isin  # type: ignore[attr-defined]
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(module)
    finally:
        sys.path.remove(str(folder))


def similarities(shape: tuple[int, int], *, ties: bool) -> torch.Tensor:
    """Random similarities; with ties, they have only twenty values."""
    values = torch.rand(shape, dtype=torch.float64)
    return (values * 20).floor() if ties else values


def retrieval(options: argparse.Namespace) -> None:
    """Compare mAP, AP and P@k with `compute_map` of revisitop."""
    official = imported(options.revisitop / "python", "evaluate")
    worst = {"AP": 0.0, "mAP": 0.0, "P@k": 0.0}
    for name in ("roxford5k", "rparis6k"):
        with open(options.truth / name / f"gnd_{name}.pkl", "rb") as file:
            truth = load_data_pickle(file)
        queries = truth["gnd"]
        for number in range(options.rankings):
            similarity_QN = similarities((len(queries), len(truth["imlist"])), ties=number % 2 == 1)
            order = similarity_QN.sort(dim=1, descending=True, stable=True).indices.T.numpy()
            for good, bad in LEVELS.values():
                positives = [[int(i) for key in good for i in query[key]] for query in queries]
                junk = [[int(i) for key in bad for i in query[key]] for query in queries]
                theirs = [
                    {"ok": np.array(p, int), "junk": np.array(j, int)} for p, j in zip(positives, junk, strict=True)
                ]
                mean, ap, _, precision = official.compute_map(order, theirs, list(AT))
                ours = rank_database(similarity_QN, positives=positives, junk=junk, at=AT)
                worst["mAP"] = max(worst["mAP"], abs(mean - ours.map))
                worst["AP"] = max(worst["AP"], float(np.nanmax(np.abs(ap - ours.ap.numpy()))))
                worst["P@k"] = max(worst["P@k"], float(np.nanmax(np.abs(precision - ours.precision.numpy()))))
    rankings = 2 * options.rankings
    print(f"retrieval, {rankings} rankings of {len(queries)} queries at 3 levels: " + formatted(worst))


def copies(options: argparse.Namespace) -> None:
    """Compare average precision for Copydays and the PCA with the original."""
    theirs, utils = (imported(options.original, name) for name in ("eval_copy_detection", "utils"))
    worst = 0.0
    for _ in range(30 * options.rankings):
        ranking = torch.randperm(157)[:20]
        positives = torch.randperm(157)[: int(torch.randint(1, 6, ()))].tolist()
        ranks = [rank for rank, image in enumerate(ranking.tolist()) if image in positives]
        official = theirs.score_ap_from_ranks_1(ranks, len(positives))
        ours = float(average_precision_at_top(ranking[None], positives=[positives]))
        worst = max(worst, abs(official - ours))
    print(f"copy detection, {30 * options.rankings} rankings: " + formatted({"AP": worst}))

    learned, images = torch.randn(2000, 96) @ torch.randn(96, 96) + 3, torch.randn(200, 96) @ torch.randn(96, 96) + 3
    ours_ND = torch.nn.functional.normalize(learn_whitening(learned, corrected=False)(images))
    for dtype in (torch.float64, torch.float32):
        features = learned.to(dtype)
        pca = utils.PCA(dim=96, whit=0.5)
        pca.train_pca((features.T @ features / len(features)).numpy())
        theirs_ND = torch.from_numpy(pca.apply((images.to(dtype) - features.mean(0)).numpy()))
        theirs_ND = torch.nn.functional.normalize(theirs_ND.double())
        difference = float((ours_ND @ ours_ND.T - theirs_ND @ theirs_ND.T).abs().max())
        print(f"whitening as in the original, its covariance in {str(dtype)[6:]}: " + formatted({"cosine": difference}))


def video(options: argparse.Namespace) -> None:
    """Compare mean, recall and decay of J and F for each object."""
    metrics, utils = (imported(options.davis2017, f"davis2017.{name}") for name in ("metrics", "utils"))
    worst, objects = 0.0, 0
    for folder in sorted((options.data / "Annotations" / "480p").iterdir()):
        true_THW = masks_in(folder)
        predicted_THW = masks_in(options.masks / folder.name) if options.masks else np.roll(true_THW, 5, axis=0)
        count = int(true_THW[0].max())
        ours = object_scores(torch.from_numpy(predicted_THW), torch.from_numpy(true_THW), objects=count)
        for number, scores in enumerate(ours, start=1):
            pair = [maps[1:-1] == number for maps in (true_THW, predicted_THW)]
            official = [
                100 * value
                for measure in (metrics.db_eval_iou, metrics.db_eval_boundary)
                for value in utils.db_statistics(measure(*pair))
            ]
            worst = max(worst, float(np.abs(np.array(official) - scores.values()).max()))
            objects += 1
    print(f"video, {objects} objects, mean, recall and decay of J and F in percent: " + formatted({"largest": worst}))


def masks_in(folder: Path) -> np.ndarray:
    """The masks of a folder (T, H, W), with void pixels as background."""
    masks_THW = np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))])
    return np.where(masks_THW == 255, 0, masks_THW)


def formatted(differences: dict[str, float]) -> str:
    """The differences as text."""
    return ", ".join(f"{name} {value:.1e}" for name, value in differences.items())


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
