"""Features of a data set: extraction, the cache on disk, and the k-NN search."""
