"""From image files to batches of crops: sources, decoding, cache, augmentation, loaders, the data module."""
