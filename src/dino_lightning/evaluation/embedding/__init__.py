"""Features for your own programs: `load_backbone`, `embed`, `DinoFeatures`, and the command `dino embed`."""
