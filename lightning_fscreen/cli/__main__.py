"""`python -m lightning_fscreen.cli`, the same as `fscreen`."""

from lightning_fscreen.cli.run import main

main()
