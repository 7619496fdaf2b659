"""Features of a dataset: extraction, the cache on disk, and the k-NN search."""
