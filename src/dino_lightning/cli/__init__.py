"""The charts of a run at Weights & Biases, in sections: `dino-wandb`."""
