"""Candidates for pruning, with the statistics and the parameters that belong to them."""

# One line for each granularity: its import registers it.
from lightning_fscreen.candidates import channels as channels
from lightning_fscreen.candidates import units as units
from lightning_fscreen.candidates import weights as weights
