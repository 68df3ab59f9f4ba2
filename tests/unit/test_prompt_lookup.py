"""What a sequence says of its own end."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from speculation.prompt_lookup import MAX_MATCH, NOTHING, LookedUp, LookupStatistics, PromptLookup


def look_up(committed: Sequence[int], ahead: Sequence[int] = (), num_tokens: int = 4) -> LookedUp:
    return PromptLookup(LookupStatistics()).find(committed, ahead, num_tokens)


def naive(tokens: Sequence[int], num_tokens: int) -> LookedUp:
    """The definition: what follows the longest match of the end, the latest of equals, read on into itself."""
    best, best_end = 0, 0
    for end in range(1, len(tokens)):
        length = 0
        while length < min(MAX_MATCH, end) and tokens[end - 1 - length] == tokens[len(tokens) - 1 - length]:
            length += 1
        if length and length >= best:
            best, best_end = length, end
    if not best or num_tokens <= 0:
        return NOTHING
    found = list(tokens)
    for index in range(num_tokens):
        found.append(found[best_end + index])
    return LookedUp(tuple(found[len(tokens) :]), best)


def test_the_longest_match_wins_and_the_latest_of_equals() -> None:
    assert look_up([1, 2, 3, 7, 7, 9, 3, 8, 8, 1, 2, 3]) == LookedUp((7, 7, 9, 3), 3)
    assert look_up([3, 7, 4, 3, 8, 5, 3], num_tokens=2) == LookedUp((8, 5), 1)


def test_what_is_staged_is_part_of_the_end_and_of_the_text() -> None:
    assert look_up([1, 2, 3, 9], [1, 2], num_tokens=1) == LookedUp((3,), 2)
    assert look_up([1, 2], [5, 6, 5], num_tokens=2) == LookedUp((6, 5), 1)


def test_a_loop_goes_on() -> None:
    assert look_up([4, 1, 2, 1, 2], num_tokens=5) == LookedUp((1, 2, 1, 2, 1), 2)


@pytest.mark.parametrize("committed", [[], [1], [1, 2, 3]])
def test_an_end_that_never_was_before_finds_nothing(committed: list[int]) -> None:
    assert look_up(committed) == NOTHING


def test_no_room_finds_nothing() -> None:
    assert look_up([1, 1, 1], num_tokens=0) == look_up([1, 1, 1], num_tokens=-3) == NOTHING


def test_it_follows_a_growing_sequence_and_forgets_what_was_only_staged() -> None:
    rng = random.Random(5)
    lookup, committed = PromptLookup(LookupStatistics()), list[int]()
    for _ in range(400):
        committed += rng.choices(range(4), k=rng.randrange(4))
        ahead, num_tokens = rng.choices(range(4), k=rng.randrange(5)), rng.randrange(8)
        assert lookup.find(committed, ahead, num_tokens) == naive([*committed, *ahead], num_tokens)


def test_token_ids_as_large_as_a_vocabulary_may_be() -> None:
    assert look_up([2**31 - 1, 8, 2**31 - 1], num_tokens=1).token_ids == (8,)


def test_chances_are_learned_by_the_length_of_the_match_and_passed_on() -> None:
    worker = LookupStatistics()
    lookup = PromptLookup(worker)
    long, short = LookedUp((1, 2, 3), 5), LookedUp((1, 2, 3), 1)
    for _ in range(200):
        lookup.observe(long, [1, 2, 3, 4])
        lookup.observe(short, [9, 2])
    assert min(lookup.chances(long)) > 0.9
    assert max(lookup.chances(short)) < 0.1
    another = PromptLookup(worker)
    assert min(another.chances(long)) > 0.9
    assert max(another.chances(short)) < 0.1


def test_only_what_the_target_has_decided_is_evidence() -> None:
    """Three tokens were guessed and two are known: of the third nothing is learned."""
    lookup = PromptLookup(LookupStatistics())
    before = lookup.chances(LookedUp((1, 2, 3), 2))
    for _ in range(50):
        lookup.observe(LookedUp((1, 2, 3), 2), [1, 2])
    after = lookup.chances(LookedUp((1, 2, 3), 2))
    assert all(late > early for early, late in zip(before, after, strict=True))
    lookup.observe(LookedUp((1, 2, 3), 2), [])
    assert lookup.chances(LookedUp((1, 2, 3), 2)) == after
