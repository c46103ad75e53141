import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_fscreen.ranking.budget import Budget
from lightning_fscreen.ranking.schedule import SCHEDULES


@given(
    st.sampled_from(sorted(SCHEDULES)), st.floats(0, 0.99), st.integers(0, 4), st.integers(1, 6), st.integers(1, 999)
)
def test_following_the_budget_ends_at_the_amount_and_asks_no_more(schedule, amount, start, length, total):
    budget = Budget(amount, SCHEDULES[schedule], (start, start + length), total)
    targets = []
    for epoch in range(start + length + 3):
        asked = budget.asks_for_more(epoch)
        before = budget.target
        budget.met(epoch)
        assert asked == (budget.target > before)
        targets.append(budget.target)
    assert targets == sorted(targets) and targets[-1] == targets[start + length - 1] == round(amount * total)
    assert budget.fraction(start + length) == pytest.approx(amount)


def test_what_units_could_not_meet_is_not_asked_for_again():
    budget = Budget(0.5, SCHEDULES["one_shot"], (0, 1), 7)
    assert budget.asks_for_more(0)
    budget.met(0)  # whatever was really pruned
    assert budget.target == round(3.5) and not budget.asks_for_more(1)
