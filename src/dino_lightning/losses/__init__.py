"""Loss functions on tensors: cross-view losses and their chunked form, centering, feature queue, InfoNCE, KoLeo."""
