from __future__ import annotations

import math

import pytest
from scipy.stats import f as f_distribution
from scipy.stats import ncf

from lightning_fscreen.statistics.sampling import collection_stride, instances_needed


@pytest.mark.parametrize("num_classes", [2, 3, 10, 100, 1000])
def test_a_small_effect_is_found_nine_times_in_ten(num_classes):
    n = instances_needed(num_classes)
    degrees = num_classes - 1, n - num_classes
    power = ncf.sf(f_distribution.isf(1e-3, *degrees), *degrees, n * 0.01 / 0.99)
    assert power == pytest.approx(0.9, abs=0.03)


def test_evenly_spaced_batches_give_at_least_what_is_needed():
    for num_batches in (1, 7, 50, 469, 10_000):
        for instances in (1, 8, 128, 5000):
            stride = collection_stride(num_batches, instances, 10)
            gathered = len(range(0, num_batches, stride)) * instances
            assert gathered >= min(instances_needed(10), num_batches * instances)
            assert stride == 1 or gathered < 2 * instances_needed(10) + instances


def test_without_an_end_in_sight_every_batch_is_gathered():
    assert collection_stride(math.inf, 128, 10) == 1
    assert collection_stride(0, 128, 10) == 1
