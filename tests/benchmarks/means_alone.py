"""The default criterion as it was before other evidence than the classes' means counted, as a user's own criterion.

    PYTHONPATH=. fscreen-bench table=blind_spots \
        '+table.methods.means=["callbacks.fscreen.criterion=tests.benchmarks.means_alone:means_alone"]'
"""

import torch

from lightning_fscreen import register_criterion
from lightning_fscreen.functional import f_critical


@register_criterion("means_alone", needs_statistics=lambda screening_weight: True)
def means_alone(context):
    """R = |w|^(1 − λ) · s^λ with s = 1 − F*/F, and 10⁻⁶·F/F* where F is below its critical value F*."""
    scores = {}
    for name, layer in context.layers.items():
        ratio = layer.f / f_critical(1e-3, *layer.degrees)
        shrunken = torch.maximum(1 - 1 / ratio.clamp(min=1), 1e-6 * ratio.clamp(max=1)).to(layer.weight)
        scores[name] = layer.weight.abs() ** (1 - context.screening_weight) * shrunken**context.screening_weight
    return scores
