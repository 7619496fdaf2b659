"""One file for each evaluation: its protocol, as `evaluate(config, task)`."""
