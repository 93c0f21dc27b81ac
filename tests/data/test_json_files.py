"""JSON from outside: bounds, and errors that name file, field, value, rule and remedy."""

import json

import pytest

from earlyfuse.data.console import printable
from earlyfuse.data.json_files import MOST_BYTES, MOST_NESTED, JsonObject, load_json, read_json

REMEDY = "write it again"


def nested(levels, opening="[", closing="]"):
    return opening * levels + closing * levels


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not valid JSON"),
        (b'{"a": 1', "not valid JSON"),
        (b"\xff\xfe\x00", "not valid JSON"),
        (b"[1, 2]", "must hold a JSON object"),
        (nested(100_000).encode(), "levels deep"),
        (f'{{"a": {nested(MOST_NESTED)}}}'.encode(), "levels deep"),
        (json.dumps({"a": "b" * 100}).encode(), "larger than 100 bytes"),
        (None, "cannot be read"),
    ],
)
def test_damage_is_refused_by_file_and_remedy(tmp_path, content, said):
    path = tmp_path / "fields.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=said) as caught:
        read_json(path, REMEDY, most_bytes=100 if "larger" in said else MOST_BYTES)
    assert str(path) in str(caught.value)
    assert str(caught.value).endswith(REMEDY)


def test_the_largest_file_and_the_deepest_nesting_allowed_are_read(tmp_path):
    path = tmp_path / "fields.json"
    path.write_bytes(b'{"a": 1}')
    assert read_json(path, REMEDY, most_bytes=8).field("a", int) == 1
    value = load_json(nested(MOST_NESTED), "here", REMEDY)
    assert load_json(nested(MOST_NESTED).encode(), "here", REMEDY) == value


@pytest.mark.parametrize(
    ("kind", "right", "wrong"),
    [
        (str, "x", [1, None, ["x"], True]),
        (int, 3, ["3", 3.0, True, None]),
        (float, 0.5, ["0.5", float("nan"), float("inf"), True, None, 10**400]),
        (bool, False, [0, "false", None]),
        (list, [1], [{}, "1", None]),
        (dict, {"a": 1}, [[], "a", None]),
    ],
)
def test_a_field_is_of_the_type_asked_for_or_refused(kind, right, wrong):
    assert JsonObject({"f": right}, "file", REMEDY).field("f", kind) == right
    for value in wrong:
        with pytest.raises(ValueError, match=r"file: f \(.*\) must be .*; write it again"):
            JsonObject({"f": value}, "file", REMEDY).field("f", kind)


def test_bounds_choices_and_unknown_names_are_refused():
    fields = JsonObject({"n": 5, "kind": "b", "inner": {"x": 1}, "many": [{"y": 2}, 3]}, "f", "fix")
    assert fields.field("n", float, least=0) == 5.0
    assert fields.object("inner").field("x", int) == 1
    for call in (
        lambda: fields.field("n", int, most=4),
        lambda: fields.field("kind", str, choices=("a", "c")),
        lambda: fields.field("gone", int),
        lambda: fields.object("inner").field("x", str),
        lambda: fields.objects("many"),
        lambda: fields.items("many", int),
        lambda: fields.check_names(("n", "kind")),
    ):
        with pytest.raises(ValueError, match=r"^f.*; fix$"):
            call()
    assert fields.field("gone", int, default=7) == 7


def test_an_error_shows_little_of_a_large_value_and_no_control_character():
    huge = JsonObject({"f": ["\x1b[2J" * 1000] * 1000}, "file", REMEDY)
    with pytest.raises(ValueError) as caught:
        huge.field("f", int)
    assert len(str(caught.value)) < 400
    assert "\x1b" not in str(caught.value)


def test_printable_escapes_what_moves_the_cursor_and_keeps_letters():
    assert printable("a\x1b[31mb\r\x07\x9b\u202e") == "a\\x1b[31mb\\r\\x07\\x9b\\u202e"
    assert printable("é 漢字 👩‍🚀 ا ق") == "é 漢字 👩‍🚀 ا ق"
    assert printable("two\nlines\x00", keep="\n") == "two\nlines\\x00"
    assert printable("\udcff") == "\\udcff"
