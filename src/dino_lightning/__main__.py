"""`python -m dino_lightning VERB ...`: the same as `dino VERB ...`."""

import sys

from dino_lightning.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
