"""What can be pruned, with the statistics and the parameters that belong to it."""

# One line for each granularity: its import registers it.
from lightning_fscreen.candidates import channels as channels
from lightning_fscreen.candidates import weights as weights
