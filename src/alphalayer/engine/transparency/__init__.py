"""LayerDiffuse: patches, transparent decoder and their composition."""
