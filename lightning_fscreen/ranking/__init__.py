"""From scores to masks: criteria, schedules, budgets."""

from lightning_fscreen.ranking import fused as fused  # registers its criteria
