"""Images as bytes: codecs, post-processing, generation settings."""
