"""`python train.py ARGS` is `dino train ARGS`, without an installation of the package's commands."""

import sys

from dino_lightning.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
