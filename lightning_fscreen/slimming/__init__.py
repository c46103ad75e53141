"""Physical slimming: capture → slots → liveness → plan → rewrite, verified."""

from lightning_fscreen.slimming.capture import CaptureError
from lightning_fscreen.slimming.dead import VerificationError, remove_dead_units
from lightning_fscreen.slimming.plan import PlanError, SlimmingPlan

__all__ = ["CaptureError", "PlanError", "SlimmingPlan", "VerificationError", "remove_dead_units"]
