"""`python -m lightning_fscreen.cli`, the same as `fscreen`."""

from lightning_fscreen.cli.run import main

if __name__ == "__main__":
    main()
