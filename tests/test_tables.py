from __future__ import annotations

import pytest

from lightning_fscreen.tables import Row, Style, Table, folded, grouped, listing, readable


def test_many_rows_are_folded_by_as_many_levels_of_their_names_as_fit() -> None:
    rows = [Row(f"net.{block}.{layer}", ((2, 1), None)) for block in range(10) for layer in "abcd"]
    rows.append(Row("net.head", ((5, 5), (3,))))
    assert folded(rows, 41) == rows
    folds = folded(rows, 40)
    assert folds == [*(Row(f"net.{block}.* (4)", ((8, 4), None)) for block in range(10)), rows[-1]]
    assert folded(rows, 5) == [Row("net.* (41)", ((85, 45), (3,)))]
    flat = [Row(str(number), ((1,),)) for number in range(50)]
    assert folded(flat, 40) == flat  # nothing to fold by


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0"), (999_999, "999,999"), (1_000_000, "1 M"), (25_557_032, "25.56 M"), (4_089_184_256, "4.089 G")],
)
def test_large_counts_have_units(count: int, text: str) -> None:
    assert readable(count) == text


def test_equal_reasons_are_said_once_and_long_lists_are_cut() -> None:
    names = [f"layer{number}" for number in range(9)]
    pairs = [(name, "frozen" if name != "layer1" else "left out") for name in names]
    assert grouped(pairs) == ["frozen: layer0, layer2, layer3, layer4 and 4 more", "left out: layer1"]
    assert listing(names[:5]) == ", ".join(names[:5]) and listing([""]) == "the module itself"


def test_values_have_no_sums() -> None:
    rows = tuple(Row(f"net.{number}", ((1,), (0.12345,))) for number in range(3))
    columns: tuple[tuple[str, Style], ...] = (("units", "counts"), ("score", "value"))
    assert str(Table("title", columns, rows, most_rows=3)).splitlines()[-1].split() == ["net.2", "1", "0.1235"]
    assert "net.* (3)      3      –" in str(Table("title", columns, rows, most_rows=2))
