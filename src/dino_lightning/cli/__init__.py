"""The `dino` commands, one file each, with overrides, completion, error messages and sweeps."""
