"""The process of a run: ranks, collectives, sharding, signals, schedulers, locks, files, console, precision."""
