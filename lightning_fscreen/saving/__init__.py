"""Files that outlive a fit."""
