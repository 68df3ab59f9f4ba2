"""The fingerprint is part of the protocol: its values may not change."""

from hypothesis import given
from hypothesis import strategies as st

from speculation.fingerprint import EMPTY, extend, fingerprint, mix64

TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=20)


def test_mix64_is_the_splitmix64_finaliser() -> None:
    # First outputs of splitmix64 seeded with 0 (Vigna's reference code): mix64 of multiples of the golden gamma.
    gamma = 0x9E3779B97F4A7C15
    assert [mix64(gamma * n) for n in (1, 2, 3)] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_golden_values() -> None:
    assert fingerprint([]) == EMPTY == 0x6F75747269646572
    assert fingerprint([0]) == mix64(EMPTY ^ mix64(0x9E3779B97F4A7C15))
    assert fingerprint([1, 2, 3]) == 0xED0F898457CC358E


@given(TOKENS, TOKENS)
def test_extending_equals_hashing_the_whole(prefix: list[int], rest: list[int]) -> None:
    value = fingerprint(prefix)
    for token in rest:
        value = extend(value, token)
    assert value == fingerprint(prefix + rest)


@given(TOKENS, TOKENS)
def test_different_prefixes_differ(left: list[int], right: list[int]) -> None:
    assert (fingerprint(left) == fingerprint(right)) == (left == right)
