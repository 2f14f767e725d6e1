"""Model families: how checkpoints of each become a `DiffusionModel`."""
