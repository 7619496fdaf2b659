"""Chooses settings from the images (`auto.data`) and the machine (`auto.machine`): `apply` uses the other files."""
