import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_fscreen.ranking.window import Length, Window, window_in_epochs, window_in_steps


def test_rounds_in_epochs_are_epochs():
    assert [Window(2, 5).round_end(epoch) for epoch in range(8)] == list(range(1, 9))


@given(st.integers(0, 20), st.integers(1, 40), st.integers(1, 15))
def test_rounds_in_steps_are_counted_back_from_the_end_of_the_window(start, length, every):
    window = Window(start, start + length, every, "step")
    ends = [position for position in range(1, 100) if (position - window.end) % every == 0]
    for position in range(80):
        assert window.round_end(position) == min(end for end in ends if end > position)


@pytest.mark.parametrize(
    ("length", "total", "is_short"),
    [
        (Length(), None, False),
        (Length(epochs=4), None, False),
        (Length(steps=50), 50, True),
        (Length(epochs=1, steps_per_epoch=30), 30, True),
        (Length(epochs=2, steps_per_epoch=30), 60, False),
        (Length(epochs=9, steps=40, steps_per_epoch=30), 40, True),
        (Length(epochs=9, steps=40), 40, False),
    ],
)
def test_the_shorter_limit_counts(length, total, is_short):
    assert length.total_steps == total and length.is_short is is_short


def test_the_end_is_counted_in_either_unit():
    assert Length(epochs=9, steps=40, steps_per_epoch=30).last("epoch") == 2
    assert Length(epochs=9).last("epoch") == 9 and Length(epochs=9).last("step") is None


@pytest.mark.parametrize(
    ("given_window", "window"),
    [
        ((None, None, None), Window(0, 50, 5, "step")),
        ((20, None, 7), Window(20, 50, 7, "step")),
        ((80, None, None), Window(80, 81, 1, "step")),
        ((0, 100, None), Window(0, 100, 10, "step")),
    ],
)
def test_left_out_it_is_the_first_half_in_ten_rounds(given_window, window):
    assert window_in_steps(*given_window, Length(steps=100)) == window


def test_epochs_left_out_are_the_first_half():
    assert window_in_epochs(0, None, Length(epochs=9)) == Window(0, 4)
    assert window_in_epochs(0, 0, Length(epochs=9)) == Window(0, 0)
    assert window_in_epochs(3, 5, Length()) == Window(3, 5)
