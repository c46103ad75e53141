"""Criteria, for those who write their own; they live in `lightning_fscreen.ranking.criteria`."""

from lightning_fscreen.ranking.criteria import (
    CRITERIA,
    Criterion,
    Explained,
    Scores,
    ScoringContext,
    ScoringInputs,
    register_criterion,
    required,
    resolve_criterion,
    scoring_dtype,
)

Ranked = ScoringInputs  # its former name

__all__ = [
    "CRITERIA",
    "Criterion",
    "Explained",
    "Ranked",
    "Scores",
    "ScoringContext",
    "ScoringInputs",
    "register_criterion",
    "required",
    "resolve_criterion",
    "scoring_dtype",
]
