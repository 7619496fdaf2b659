"""Measures the memory of a k-NN search with the size of ImageNet and random features, on a CPU or a GPU.

    python benchmarks/knn_memory.py                                  bank of 1.28 M x 384, 50,000 queries
    python benchmarks/knn_memory.py --queries 2000 --json            the same bank in minutes

Prints the peak memory of the process (including the features) and whether it is at most 16 GiB; if not, the exit status
is 1. The memory of a GPU is printed separately.
"""

import argparse
import json
import resource
import sys
import time

import torch

from dino_lightning.evaluation.features.knn import nearest_neighbors, vote_accuracy

LIMIT_GIB = 16
CLASSES = 1000
K = [10, 20, 100, 200]


def main() -> None:
    """Search and vote as in `eval=knn` and print the peak memory."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bank", type=int, default=1_281_167, help="features in the bank")
    parser.add_argument("--queries", type=int, default=50_000, help="number of queries")
    parser.add_argument("--dim", type=int, default=384, help="width of a feature")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="threads of PyTorch")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)

    generator = torch.Generator().manual_seed(0)
    bank_ND = torch.randn(options.bank, options.dim, generator=generator)
    queries_MD = torch.randn(options.queries, options.dim, generator=generator)
    bank_labels_N = torch.randint(CLASSES, (options.bank,), generator=generator)
    query_labels_M = torch.randint(CLASSES, (options.queries,), generator=generator)
    features = _peak_gib()
    started = time.perf_counter()
    neighbors = nearest_neighbors(bank_ND, queries_MD, k=max(K), device=device)
    searched = time.perf_counter()
    accuracy = vote_accuracy(*neighbors, bank_labels_N, query_labels_M, k=K, temperature=0.07, num_classes=CLASSES)
    voted = time.perf_counter()

    print(
        f"bank of {options.bank:,} x {options.dim}, {options.queries:,} queries, {max(K)} neighbors, on {device}, "
        f"{torch.get_num_threads()} threads, PyTorch {torch.__version__}"
    )
    print(f"search {searched - started:.1f} s, votes {voted - searched:.1f} s")
    print(f"top-1 at k = 20: {accuracy[20]['top1']:.2f} (chance: {100 / CLASSES:.2f})")
    peak = _peak_gib()
    if device.type == "cuda":
        print(f"GPU memory: {torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB at the peak")
    print(f"memory: {features:.2f} GiB with the features, {peak:.2f} GiB at the peak")
    print(f"within {LIMIT_GIB} GiB: {'pass' if peak <= LIMIT_GIB else 'FAIL'}")
    if options.json:
        seconds = {"search_s": round(searched - started, 1), "votes_s": round(voted - searched, 1)}
        memory = {"features_gib": round(features, 2), "peak_gib": round(peak, 2), "within": peak <= LIMIT_GIB}
        settings = {"bank": options.bank, "queries": options.queries, "dim": options.dim, "device": str(device)}
        print(json.dumps({**settings, **seconds, **memory}))
    sys.exit(peak > LIMIT_GIB)


def _peak_gib() -> float:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


if __name__ == "__main__":
    main()
