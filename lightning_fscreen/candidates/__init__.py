"""What can be pruned, with the statistics and the parameters that belong to it."""
