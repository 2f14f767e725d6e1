"""The engine: prompts, samplers, networks and transparency. The only package that imports torch."""
