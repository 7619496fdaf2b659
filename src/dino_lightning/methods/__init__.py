"""DINO, BYOL, MoCo, SwAV and supervised training as LightningModules that share one optimizer step."""
