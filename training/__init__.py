"""Training of the embedded model. It runs alone and the package never imports it."""
