"""Which cores the roles of a local stack are kept on."""

from outrider.launcher import COORDINATOR, DRAFT, TARGET, cores_of


def test_the_target_has_its_cores_to_itself() -> None:
    assert cores_of(TARGET, [0, 1], drafting=True) == {0}
    assert cores_of(DRAFT, [0, 1], drafting=True) == cores_of(COORDINATOR, [0, 1], drafting=True) == {1}
    assert cores_of(TARGET, [2, 3, 5, 7], drafting=True) == {2, 3}
    assert cores_of(DRAFT, [2, 3, 5, 7], drafting=True) == {5, 7}


def test_nobody_is_kept_where_there_is_nothing_to_share() -> None:
    assert cores_of(TARGET, [0], drafting=True) is None
    assert cores_of(TARGET, [0, 1], drafting=False) is None
