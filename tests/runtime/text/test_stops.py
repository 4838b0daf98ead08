"""Stop strings are found as a search in the whole text finds them, however it is cut into pieces."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxsplit.errors import InputError
from runtime.text import stops as module
from runtime.text.options import TextOptions
from runtime.text.stops import StopStrings

LETTERS = st.text("ab\n🙂", max_size=4)


def plain(text: str, stops: list[str], *, include: bool) -> tuple[str, str | None]:
    """The text before the stop string that is complete first, and that string; of several with one end, the longest."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


@settings(max_examples=1000)
@given(st.lists(LETTERS, max_size=12), st.lists(LETTERS.filter(bool), max_size=4), st.booleans())
def test_pieces_give_what_the_whole_text_gives(pieces, stops, include):
    wanted, found = plain("".join(pieces), stops, include=include)
    search = StopStrings(stops, include=include)
    given_out = ""
    for piece in pieces:
        given_out += search.add(piece)
        assert wanted.startswith(given_out), "what is given out is never taken back"
    given_out += search.finish()
    assert (given_out, search.found) == (wanted, found)


@given(st.lists(LETTERS, max_size=12), st.lists(LETTERS.filter(bool), max_size=4))
def test_no_more_is_held_back_than_may_become_a_stop_string(pieces, stops):
    search = StopStrings(stops)
    text, given_out = "", ""
    for piece in pieces:
        text += piece
        given_out += search.add(piece)
        held = text[len(given_out) :]
        if search.found is None:
            assert not held or any(stop.startswith(held) for stop in stops)


@pytest.mark.parametrize(
    ("stop", "message"),
    [
        ("", "stop holds ''"),
        (["a", ""], "stop holds ''"),
        (["a"] * 17, "stop has 17 strings; at most 16"),
        ([1], "stop holds 1"),
        ("x" * 1025, "strings of 1 to 1024 characters"),
        (5, "stop must be a string or a list of strings, not 5"),
        ({"a": 1}, "stop must be a string or a list"),
    ],
)
def test_wrong_stop_strings_are_refused(stop, message):
    with pytest.raises(InputError, match=message):
        TextOptions(stop=stop).stops()


def test_long_stop_strings_take_few_comparisons(monkeypatch):
    compared = []

    def overlap(text, stop, most):
        found = original(text, stop, most)
        compared.append(max(0, min(len(text), len(stop) - 1, most) - found))
        return found

    original = module._overlap
    monkeypatch.setattr(module, "_overlap", overlap)
    finder = StopStrings(["a" * 900 + "b", *("a" * count + "c" * 900 for count in range(1, 16))])
    for _ in range(800):
        assert finder.add("a") == ""
    assert finder.add("d") == "a" * 800 + "d"
    assert sum(compared) <= 16 * 801
