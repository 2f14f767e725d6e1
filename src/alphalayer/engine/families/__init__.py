"""Model families: one module each, behind the interface in `base`."""
