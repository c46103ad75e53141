"""From activations to sums by class, and from these to statistics."""
