"""Hydra configs; a package, so that installed ones are found."""
