"""Features in other people's programs: `load_backbone`, `embed`, `DinoFeatures`, and the command `dino embed`."""
