"""What is done with a trained network, without a Trainer: screened, explained, measured, pruned."""
