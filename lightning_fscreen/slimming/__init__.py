"""Physical slimming: capture → slots → liveness → plan → rewrite, verified."""

from lightning_fscreen.slimming.capture import CaptureError
from lightning_fscreen.slimming.dead import remove_dead_units
from lightning_fscreen.slimming.gates import Gate, find_gates
from lightning_fscreen.slimming.plan import PlanError, SlimmingPlan
from lightning_fscreen.slimming.slim import slim
from lightning_fscreen.slimming.verify import VerificationError

__all__ = [
    "CaptureError",
    "Gate",
    "PlanError",
    "SlimmingPlan",
    "VerificationError",
    "find_gates",
    "remove_dead_units",
    "slim",
]
