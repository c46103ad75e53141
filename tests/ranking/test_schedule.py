from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_fscreen.ranking.schedule import SCHEDULES, logistic, resolve_schedule, scheduled_fraction

NAMES = sorted(SCHEDULES)
progress = st.floats(0, 1)


@pytest.mark.parametrize("name", NAMES)
def test_a_schedule_starts_at_exactly_zero_and_ends_at_exactly_one(name):
    assert SCHEDULES[name](0.0) == 0.0
    assert SCHEDULES[name](1.0) == 1.0


@pytest.mark.parametrize("name", NAMES)
@given(progress, progress)
def test_a_schedule_is_monotone_and_stays_in_the_unit_interval(name, one, other):
    low, high = sorted((one, other))
    assert 0 <= SCHEDULES[name](low) <= SCHEDULES[name](high) + 1e-15 <= 1 + 2e-15


@given(progress)
def test_logistic_is_symmetric_about_the_middle(t):
    assert math.isclose(logistic(t) + logistic(1 - t), 1, abs_tol=1e-12)


def test_logistic_is_slow_then_fast_then_slow():
    steps = [b - a for a, b in pairwise(logistic(t / 10) for t in range(11))]
    assert steps[:5] == sorted(steps[:5])
    assert steps[5:] == sorted(steps[5:], reverse=True)
    assert steps[4] > 5 * steps[0]


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("linear", [0, 0.25, 0.5, 0.75, 1]),
        ("cubic", [0, 1 - 27 / 64, 7 / 8, 63 / 64, 1]),
        ("one_shot", [0, 0, 0, 0, 1]),
    ],
)
def test_closed_forms(name, values):
    assert [SCHEDULES[name](t / 4) for t in range(5)] == pytest.approx(values)


@pytest.mark.parametrize("name", NAMES)
def test_names_resolve_to_their_schedules(name):
    assert resolve_schedule(name) is SCHEDULES[name]


def test_a_callable_resolves_to_itself():
    assert resolve_schedule(math.sqrt) is math.sqrt


def test_an_unknown_name_is_an_error_that_lists_the_known():
    with pytest.raises(ValueError, match="'cosine'.*cubic.*linear.*logistic.*one_shot.*callable"):
        resolve_schedule("cosine")


def test_a_callable_that_does_not_end_at_one_is_an_error_that_names_its_end():
    with pytest.raises(ValueError, match=r"1 at progress 1.*returns 0\.5"):
        resolve_schedule(lambda t: t / 2)


def test_what_is_neither_name_nor_callable_is_a_type_error():
    with pytest.raises(TypeError, match=r"0\.5"):
        resolve_schedule(0.5)


@pytest.mark.parametrize("name", NAMES)
@given(st.integers(0, 20), st.integers(1, 20))
def test_a_window_runs_from_nothing_to_everything_and_never_back(name, start, length):
    fractions = [scheduled_fraction(SCHEDULES[name], e, start, start + length) for e in range(start + length + 5)]
    assert fractions[: start + 1] == [0.0] * (start + 1)
    assert fractions[start + length :] == [1.0] * 5
    assert fractions == sorted(fractions)


def test_progress_is_the_share_of_the_window_that_is_completed():
    seen = []

    def record(t):
        seen.append(t)
        return t

    assert [scheduled_fraction(record, e, 2, 6) for e in range(8)] == [0, 0, 0, 0.25, 0.5, 0.75, 1, 1]
    assert seen == [0.25, 0.5, 0.75]


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan, math.inf])
def test_a_fraction_outside_the_unit_interval_is_an_error_that_names_where(value):
    with pytest.raises(ValueError, match=rf"progress 0\.25 it gave {value}"):
        scheduled_fraction(lambda t: value, 1, 0, 4)


def test_rounding_just_outside_is_clipped():
    assert scheduled_fraction(lambda t: 1 + 1e-12, 1, 0, 4) == 1.0
    assert scheduled_fraction(lambda t: -1e-12, 1, 0, 4) == 0.0
