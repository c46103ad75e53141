"""Physical slimming: capture → slots → liveness → plan → rewrite, verified."""

from lightning_fscreen.slimming.capture import CaptureError
from lightning_fscreen.slimming.dead import remove_dead_units
from lightning_fscreen.slimming.elementwise import pointwise
from lightning_fscreen.slimming.gates import Gate, find_gates
from lightning_fscreen.slimming.interpreter import Unsupported, Walk
from lightning_fscreen.slimming.operators import register_operator
from lightning_fscreen.slimming.plan import PlanError, SlimmingPlan
from lightning_fscreen.slimming.slim import slim
from lightning_fscreen.slimming.slots import Value
from lightning_fscreen.slimming.verify import VerificationError

__all__ = [
    "CaptureError",
    "Gate",
    "PlanError",
    "SlimmingPlan",
    "Unsupported",
    "Value",
    "VerificationError",
    "Walk",
    "find_gates",
    "pointwise",
    "register_operator",
    "remove_dead_units",
    "slim",
]
