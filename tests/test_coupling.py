from __future__ import annotations

from lightning_fscreen.coupling import coupled_layers


def test_layers_are_grouped_by_the_units_that_they_share() -> None:
    units = {"a": [0, 1], "b": [2, 3], "c": [3, 1], "d": [-1, 5], "e": [-1, 6], "f": []}
    assert coupled_layers(units) == [["a", "b", "c"], ["d"], ["e"], ["f"]]
