"""Train: `python train.py` for the built-in images, `python train.py --help` for the rest."""

from dino_lightning.cli.train import train

if __name__ == "__main__":
    train()
