from pathlib import Path

import pytest

from cocoa_embed.data.rows import Item, Row


def test_a_reversed_row_exchanges_its_sides_and_keeps_image_and_source() -> None:
    row = Row(Item("find", (Path("a.png"),)), Item("a ring"), "rows, line 3", negatives=(Item("a star"),))
    turned = row.reversed()
    assert (turned.query, turned.positive, turned.negatives) == (row.positive, row.query, ())
    assert (turned.image, turned.source) == (row.image, row.source)


def test_the_images_of_a_row_include_those_of_its_negatives() -> None:
    one, other, third = (Path(f"{name}.png") for name in "abc")
    row = Row(Item("find", (one,)), Item(images=(other,)), "", negatives=(Item("a star"), Item("a ring", (third,))))
    assert row.images() == (one, other, third)
    assert [item.text for item in row.items()] == ["find", None, "a star", "a ring"]


def test_an_item_needs_a_text_or_an_image() -> None:
    with pytest.raises(ValueError, match="a text, an image, or both"):
        Item()


def test_errors_name_an_item_by_its_image_and_the_beginning_of_its_text() -> None:
    assert str(Item("x" * 100, (Path("a/b.png"),))) == f"the image a/b.png with the text '{'x' * 59}…"
    assert Item("a", (Path("b.png"),)).under(Path("/images")).image == Path("/images/b.png")
