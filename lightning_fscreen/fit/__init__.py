"""A pruner that lives in a Trainer: settings, phases, masks, optimizers, processes, report."""
