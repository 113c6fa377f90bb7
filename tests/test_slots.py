"""Templates with slots, and the tables that fill them."""

import pytest

from engine.types import BadRequest
from studio.slots import Filled, decode, fill, slots

TEMPLATE = "{product} on a {colour} table, {product}"


def test_one_prompt_a_row() -> None:
    assert slots(TEMPLATE) == ("product", "colour")
    table = 'product,colour,price\nचाय का कप,red,3\n"a ""big"" cup, {blue}",நீல,4\n\n'
    assert fill(TEMPLATE, table) == Filled(
        ("चाय का कप on a red table, चाय का कप", 'a "big" cup, {blue} on a நீல table, a "big" cup, {blue}'), ("price",)
    )


@pytest.mark.parametrize("table", ["product;colour\ncup;red, dark", "product\tcolour\r\ncup\tred, dark\r\n"])
def test_semicolons_and_tabs_part_cells_too(table: str) -> None:
    assert fill(TEMPLATE, "\ufeff" + table).prompts == ("cup on a red, dark table, cup",)


@pytest.mark.parametrize(
    ("template", "table", "words"),
    [
        ("a cup", "product\ncup", "has no slots"),
        ("a {cup", "product\ncup", "has no partner"),
        ("a { } cup", "product\ncup", "has no name"),
        (TEMPLATE, " \n", "table is empty"),
        (TEMPLATE, "product,price\ncup,3", "no column 'colour'; its columns: product, price"),
        (TEMPLATE, "product,colour", "only its first line"),
        (TEMPLATE, "product,colour\ncup", "line 2 .* has 1 cells where 2"),
        (TEMPLATE, "product,colour\ncup,red\ncup,", "line 3 .* nothing in column 'colour'"),
        (TEMPLATE, "product,colour\n" + "cup,red\n" * 501, "501 rows: at most 500"),
        (TEMPLATE, "product,colour\n" + "c" * 15_000 + ",red", "characters: at most"),
        (TEMPLATE, 'product,colour\n"' + "c" * 200_000 + '",red', "no CSV"),
    ],
)
def test_what_does_not_fit_is_a_sentence(template: str, table: str, words: str) -> None:
    with pytest.raises(BadRequest, match=words):
        fill(template, table)


def test_uploaded_tables_are_text() -> None:
    assert decode("நீல".encode(), "a.csv") == decode("நீல".encode("utf-16"), "a.csv") == "நீல"
    assert decode("\ufeffa".encode(), "a.csv") == "a"
    with pytest.raises(BadRequest, match="a.csv is no UTF-8 text"):
        decode(b"\x81\xff\xfe", "a.csv")
