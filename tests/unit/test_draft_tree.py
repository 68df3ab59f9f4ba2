"""What a draft tree keeps of proposals and commits, against a plain model of it."""

from hypothesis import given
from hypothesis import strategies as st

from speculation.draft_tree import DraftTree, Graft
from speculation.fingerprint import fingerprint
from speculation.messages import Proposal

SHORT = st.lists(st.integers(0, 2), max_size=4)
CHAIN = st.lists(st.integers(0, 2), min_size=1, max_size=4)


def proposal(prefix: list[int], chain: list[int], is_branch: bool = False) -> Proposal:
    return Proposal(len(prefix), fingerprint(prefix), tuple(chain), (1.0,) * len(chain), is_branch)


def test_a_chain_is_staged_and_followed() -> None:
    tree = DraftTree([1, 2])
    assert tree.graft(proposal([1, 2], [3, 4, 5])).num_new == 3
    assert tree.main_line(2) == [3, 4]
    assert tree.commit([3, 4]) == 0
    assert tree.main_line(9) == [5]


def test_a_miss_drops_what_does_not_agree() -> None:
    tree = DraftTree([1])
    tree.graft(proposal([1], [2, 3, 4]))
    assert tree.commit([2, 9]) == 2
    assert tree.main_line(9) == []
    assert tree.num_nodes == 0


def test_a_late_branch_goes_on_where_the_commit_has_gone_along_it() -> None:
    """Its drafter has sent it and will not send it again."""
    tree = DraftTree([1])
    tree.graft(proposal([1], [2, 3]))
    tree.commit([9])
    assert tree.graft(proposal([1], [9, 8], is_branch=True)).num_new == 1
    assert tree.graft(proposal([1, 9, 8], [7, 6], is_branch=True)).num_new == 2
    tree.commit([8, 7, 6, 5, 4])
    assert tree.graft(proposal([1, 9, 8, 7, 6, 5, 4], [3], is_branch=True)).num_new == 1
    assert tree.main_line(9) == [3]


def test_a_branch_does_not_take_the_place_of_a_main_line_that_is_still_to_come() -> None:
    tree = DraftTree([1])
    tree.graft(proposal([1], [2]))
    assert tree.graft(proposal([1, 2], [9, 8], is_branch=True)).num_new == 0
    tree.graft(proposal([1, 2], [3]))
    assert tree.graft(proposal([1, 2], [9, 8], is_branch=True)).num_new == 2
    assert tree.main_line(9) == [2, 3]


def test_a_branch_survives_the_miss_it_was_grown_for() -> None:
    tree = DraftTree([1])
    tree.graft(proposal([1], [2, 3, 4]))
    tree.graft(proposal([1, 2], [9, 8]))
    assert tree.main_line(9) == [2, 3, 4]  # the first proposed child is the main line
    assert tree.commit([2, 9]) == 2
    assert tree.main_line(9) == [8]


def test_a_late_proposal_lives_on_if_it_agrees_with_what_was_committed_since() -> None:
    tree = DraftTree([1])
    tree.commit([2, 3])
    assert tree.graft(proposal([1], [2, 3, 4, 5])).num_new == 2
    assert tree.main_line(9) == [4, 5]
    assert tree.graft(proposal([1], [2, 7, 7, 7])).num_new == 0
    assert tree.graft(proposal([1], [2, 3])).num_new == 0


def test_what_was_decided_before_it_came_is_compared_up_to_the_first_wrong_token() -> None:
    tree = DraftTree([1])
    tree.commit([2, 3])
    assert tree.graft(proposal([1], [2, 3, 4])) == Graft(num_new=1, num_late=2, num_late_right=2)
    assert tree.graft(proposal([1], [2, 7, 3])) == Graft(num_new=0, num_late=2, num_late_right=1)
    assert tree.graft(proposal([1, 2], [3])) == Graft(num_new=0, num_late=1, num_late_right=1)
    assert tree.graft(proposal([1, 9], [3])) == Graft()  # behind another prefix it says nothing


def test_wrong_fingerprint_or_unknown_parent_is_dropped() -> None:
    tree = DraftTree([1, 2])
    assert tree.graft(Proposal(2, 1234, (3,), (1.0,))).num_new == 0
    assert tree.graft(proposal([1, 2, 3], [4])).num_new == 0
    assert tree.graft(proposal([2, 2], [3])).num_new == 0
    assert tree.num_nodes == 0


def test_the_number_of_nodes_is_bounded() -> None:
    tree = DraftTree([1], max_nodes=4)
    assert tree.graft(proposal([1], [1, 2, 3])).num_new == 3
    assert tree.graft(proposal([1], [7, 8, 9])).num_new == 1
    tree.commit([1])
    assert tree.graft(proposal([1, 1, 2, 3], [4, 5, 6])).num_new == 2


@given(SHORT, st.lists(st.one_of(st.tuples(SHORT, CHAIN), CHAIN), max_size=12))
def test_equals_a_plain_set_of_sequences(
    prompt: list[int], operations: list[list[int] | tuple[list[int], list[int]]]
) -> None:
    """The tree holds exactly the sequences that extend the committed one and whose every parent was known."""
    tree = DraftTree(prompt)
    committed, known = list(prompt), set()
    for operation in operations:
        if isinstance(operation, tuple):
            prefix, chain = operation
            tree.graft(proposal(prefix, chain))
            is_attached = prefix == committed[: len(prefix)] or tuple(prefix) in known
            full = prefix + chain
            if is_attached and full[: len(committed)] == committed[: len(full)]:
                known |= {tuple(full[:stop]) for stop in range(max(len(prefix), len(committed)) + 1, len(full) + 1)}
        else:
            tree.commit(operation)
            committed += operation
            known = {node for node in known if list(node[: len(committed)]) == committed and len(node) > len(committed)}
        assert list(tree.token_ids) == committed
        assert tree.fingerprint == fingerprint(committed)
        assert tree.num_nodes == len(known)
        line = committed + tree.main_line(99)
        assert all(tuple(line[:stop]) in known for stop in range(len(committed) + 1, len(line) + 1))
        assert bool(known) == (len(line) > len(committed))
