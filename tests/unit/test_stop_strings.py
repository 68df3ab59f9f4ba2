"""Against a search through the whole text: where the answer ends, and that nothing beyond it was ever given out."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from coordinator.stop_strings import StopStringSearch

short_text = st.text("ab\n", min_size=1, max_size=4)


def pushed(search: StopStringSearch, pieces: list[str], first: int = 0) -> tuple[list[str], str | None]:
    """What each piece lets out (the flush at the end), and the stop string."""
    given_out: list[str] = []
    for index, piece in enumerate(pieces):
        text, found = search.push(piece, counts=index >= first)
        given_out.append(text)
        if found is not None:
            return given_out, found
    return [*given_out, search.flush()], None


def expected(strings: list[str], pieces: list[str], keeps_stop: bool, first: int) -> tuple[str, str | None]:
    """The whole text is looked through after each piece, from its beginning, for ends within that piece."""
    for index in range(first, len(pieces)):
        old, text = "".join(pieces[:index]), "".join(pieces[: index + 1])
        ends = [
            (start, order, string)
            for order, string in enumerate(strings)
            for start in range(len(text))
            if text.startswith(string, start) and start + len(string) > len(old)
        ]
        if ends:
            start, _, string = min(ends)
            return text[: start + len(string) if keeps_stop else start], string
    return "".join(pieces), None


@given(
    st.lists(short_text, min_size=1, max_size=4),
    st.lists(st.text("ab\n", max_size=4), max_size=12),
    st.booleans(),
    st.integers(0, 4),
)
@example(["ab", "b"], ["a", "b"], False, 0)
@example(["aab"], ["aaa", "ab"], False, 0)
@example(["b", "abc"], ["ab", "c"], False, 1)
def test_as_a_search_through_the_whole_text(strings: list[str], pieces: list[str], keeps: bool, first: int) -> None:
    given_out, found = pushed(StopStringSearch(strings, keeps), pieces, first)
    text, string = expected(strings, pieces, keeps, first)
    assert ("".join(given_out), found) == (text, string)


@given(st.lists(short_text, min_size=1, max_size=3), st.lists(st.text("ab\n", max_size=4), max_size=12))
def test_no_more_is_held_back_than_may_become_a_stop_string(strings: list[str], pieces: list[str]) -> None:
    search, given_out, text = StopStringSearch(strings, keeps_stop=False), "", ""
    for piece in pieces:
        new, found = search.push(piece)
        given_out, text = given_out + new, text + piece
        if found is not None:
            return
        held = text[len(given_out) :]
        assert not held or any(string.startswith(held) and string != held for string in strings)


def test_without_strings_nothing_is_held_back() -> None:
    assert pushed(StopStringSearch([], keeps_stop=False), ["a", "b"]) == (["a", "b", ""], None)


@pytest.mark.parametrize(("keeps", "text"), [(False, ["x", "", ""]), (True, ["x", "", "\n\n"])])
def test_a_stop_string_over_a_border(keeps: bool, text: list[str]) -> None:
    assert pushed(StopStringSearch(["\n\n"], keeps), ["x", "\n", "\ny"]) == (text, "\n\n")
