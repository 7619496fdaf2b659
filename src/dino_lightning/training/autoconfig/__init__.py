"""Settings chosen from the images and the machine: `auto.data` and `auto.machine`."""
