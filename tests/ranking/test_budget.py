import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_fscreen.ranking.budget import Budget
from lightning_fscreen.ranking.schedule import SCHEDULES
from lightning_fscreen.ranking.window import Window


@given(
    st.sampled_from(sorted(SCHEDULES)), st.floats(0, 0.99), st.integers(0, 4), st.integers(1, 6), st.integers(1, 999)
)
def test_following_the_budget_ends_at_the_amount_and_asks_no_more(schedule, amount, start, length, total):
    budget = Budget(amount, SCHEDULES[schedule], Window(start, start + length), total)
    targets = []
    for position in range(1, start + length + 4):
        asked = budget.asks_for_more(position)
        before = budget.target
        budget.met(position)
        assert asked == (budget.target > before)
        targets.append(budget.target)
    assert targets == sorted(targets) and targets[-1] == targets[start + length - 1] == round(amount * total)
    assert budget.fraction(start + length) == pytest.approx(amount)


def test_what_units_could_not_meet_is_not_asked_for_again():
    budget = Budget(0.5, SCHEDULES["one_shot"], Window(0, 1), 7)
    assert budget.asks_for_more(1)
    budget.met(1)  # whatever was really pruned
    assert budget.target == round(3.5) and not budget.asks_for_more(2)
