"""Alphalayer: text in, transparent PNG out (Stable Diffusion XL with LayerDiffuse)."""

__version__ = "0.1.0"
