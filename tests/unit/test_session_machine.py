"""All three session cores against each other, with every message lost, repeated, delayed or reordered at will.

The rule: whatever happens on the draft side, what the client gets is a prefix of plain decoding, and once messages
flow again all of it. The coordinator-target link keeps order and loses nothing but whole connections, as a gRPC
stream does.
"""

from __future__ import annotations

from collections import deque

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from speculation.adaptive_k import Load
from speculation.draft_lines import LineId
from speculation.drafter import DrafterSession
from speculation.experience import Experience
from speculation.fingerprint import fingerprint
from speculation.messages import (
    CloseSession,
    Commit,
    FinishReason,
    OpenDraft,
    OpenTarget,
    Proposal,
    Sampling,
    SessionError,
    SessionErrorCode,
    SetK,
    SetLookahead,
    Verdict,
)
from speculation.prompt_lookup import LookupStatistics
from speculation.relay import Action, Emit, Fail, Finish, RelaySession, ToDraft, ToTarget
from speculation.verifier import VerifierSession
from tests.doubles.toy_drafter import draft_with_toy
from tests.doubles.toy_model import STOP_TOKEN, VOCAB_SIZE, next_token, plain_decoding


class ScriptedK:
    """A policy whose K the test sets between steps."""

    name = "scripted"

    def __init__(self, k: int) -> None:
        self.value = k

    def observe(self, verdict: Verdict, load: Load, now_s: float) -> None:
        pass

    def k(self) -> int:
        return self.value


class SessionMachine(RuleBasedStateMachine):
    """Rules are what networks, workers and clients may do; the invariant is exactness."""

    @initialize(
        prompt=st.lists(st.integers(1, VOCAB_SIZE - 1), min_size=1, max_size=4),
        max_tokens=st.integers(1, 60),
        k=st.integers(0, 8),
        percent_right=st.sampled_from([0, 50, 85, 100]),
        lookahead=st.integers(1, 20),
        draft_max_length=st.sampled_from([0, 12]),
        max_branches=st.sampled_from([0, 1, 4]),
        max_lookup=st.integers(0, 8),
    )
    def start(
        self,
        prompt: list[int],
        max_tokens: int,
        k: int,
        percent_right: int,
        lookahead: int,
        draft_max_length: int,
        max_branches: int,
        max_lookup: int,
    ) -> None:
        self.prompt, self.percent_right = prompt, percent_right
        self.lookups, self.max_lookup = LookupStatistics(), max_lookup
        self.max_length = len(prompt) + max_tokens
        self.expected = plain_decoding(prompt, self.max_length)
        self.policy = ScriptedK(k)
        self.relay = RelaySession(
            *(prompt, Sampling(), self.max_length, [STOP_TOKEN], self.policy, lookahead, draft_max_length),
            max_branches=max_branches,
            max_lookup=max_lookup,
        )
        self.emitted: list[int] = []
        self.finish: FinishReason | None = None
        self.now_s = 0.0
        self.target: VerifierSession | None = None
        self.drafter: DrafterSession | None = None
        self.cached: dict[LineId, list[int]] = {}
        self.draft_up = False
        self.to_target: deque[object] = deque()
        self.from_target: deque[Verdict] = deque()
        self.to_draft: deque[object] = deque()
        self.from_draft: list[Proposal | SessionError] = []
        self.sent: list[Proposal] = []
        self.carry_out(self.relay.on_target_up(self.now_s))

    def carry_out(self, actions: list[Action]) -> None:
        for action in actions:
            assert not self.finish, f"{action} after the end"
            if isinstance(action, ToTarget):
                self.to_target.append(action.command)
            elif isinstance(action, ToDraft):
                self.to_draft.append(action.command)
            elif isinstance(action, Emit):
                self.emitted.extend(action.token_ids)
                assert action.num_accepted <= action.num_drafted
                assert action.num_looked_up_accepted <= action.num_looked_up
                assert action.num_accepted + action.num_looked_up_accepted <= len(action.token_ids)
            elif isinstance(action, Finish):
                self.finish = action.reason
                break
            else:
                assert isinstance(action, Fail)
                raise AssertionError(action)

    # -- target -------------------------------------------------------------------------------------------------

    @rule()
    def target_receives(self) -> None:
        if not self.to_target:
            return
        command = self.to_target.popleft()
        if isinstance(command, OpenTarget):
            self.target = VerifierSession(command, VOCAB_SIZE, Experience(lookups=self.lookups))
        elif self.target is None:
            pass
        elif isinstance(command, Proposal):
            self.target.stage(command, self.now_s)
        elif isinstance(command, SetK):
            self.target.set_k(command.k)
        elif isinstance(command, CloseSession):
            self.target = None

    @rule(want=st.integers(0, 8))
    def target_steps(self, want: int) -> None:
        if self.target is None:
            return
        self.now_s += 0.01
        drafted = self.target.drafted(want)
        tokens = list(self.target.token_ids)
        draws = [next_token(tokens + drafted[:n]) for n in range(len(drafted) + 1)]
        verdict = self.target.conclude(drafted, draws, self.now_s)
        assert verdict.num_drafted <= self.target.k
        assert len(drafted) <= max(self.target.k, self.max_lookup)
        self.from_target.append(verdict)
        if verdict.finish_reason:
            self.target = None

    @rule()
    def coordinator_hears_target(self) -> None:
        if self.from_target:
            self.carry_out(self.relay.on_target_event(self.from_target.popleft(), Load(1), self.now_s))

    @precondition(lambda self: self.finish is None)
    @rule()
    def target_is_lost_and_replaced(self) -> None:
        self.target = None
        self.to_target.clear()
        self.from_target.clear()
        self.carry_out(self.relay.on_target_lost(self.now_s))
        self.carry_out(self.relay.on_target_up(self.now_s))

    # -- drafter ------------------------------------------------------------------------------------------------

    @rule()
    def draft_comes_up(self) -> None:
        if not self.draft_up:
            self.draft_up = True
            self.carry_out(self.relay.on_draft_up(self.now_s))

    @rule()
    def draft_is_lost(self) -> None:
        if self.draft_up:
            self.draft_up, self.drafter = False, None
            self.to_draft.clear()
            self.carry_out(self.relay.on_draft_lost(self.now_s))

    @rule()
    def draft_receives(self) -> None:
        if not self.to_draft:
            return
        command = self.to_draft.popleft()
        if isinstance(command, OpenDraft):
            assert self.drafter is None
            self.drafter = DrafterSession(command, VOCAB_SIZE, 1000)
            self.cached = {self.drafter.main.id: []}
        elif self.drafter is None:
            pass
        elif isinstance(command, Commit):
            self.drafter.commit(command)
            self.follow_drafter()
        elif isinstance(command, SetLookahead):
            self.drafter.set_lookahead(command.lookahead)
            self.follow_drafter()
        else:
            self.drafter = None

    @rule(choices=st.lists(st.integers(0, 5), min_size=1, max_size=8), flush=st.sampled_from([0, 1, 4]))
    def draft_steps(self, choices: list[int], flush: int) -> None:
        if self.drafter is None:
            return
        for choice in choices:
            growths = list(self.drafter.growths())
            if not growths:
                break
            line = self.drafter.grow(growths[min(choice, len(growths) - 1)])
            cached = self.cached.get(line.id)
            if cached is None:  # a new branch forks the main line's cache
                cached = self.cached[line.id] = self.cached[self.drafter.main.id][: line.num_cached]
            cached += self.drafter.uncached(line)
            assert self.drafter.position(line) < self.max_length
            draft_with_toy(self.drafter, line, self.percent_right)
        proposals = self.drafter.take_proposals(flush) if flush else []
        self.from_draft += proposals
        self.sent += proposals

    def follow_drafter(self) -> None:
        """What an engine does with its cache after a commit or a pause; then it holds what every line begins with."""
        if self.drafter is None:
            return
        for line_id in self.cached.keys() - self.drafter.line_ids:
            del self.cached[line_id]
        del self.cached[self.drafter.main.id][self.drafter.main.num_cached :]
        for line in self.drafter.lines:
            assert self.cached[line.id] == self.drafter.sequence(line)[: line.num_cached]

    @rule(data=st.data())
    def coordinator_hears_draft(self, data: st.DataObject) -> None:
        if self.from_draft:
            index = data.draw(st.integers(0, len(self.from_draft) - 1))
            self.carry_out(self.relay.on_draft_event(self.from_draft.pop(index), self.now_s))

    @rule(data=st.data())
    def a_proposal_is_lost_or_repeated(self, data: st.DataObject) -> None:
        if self.sent:
            proposal = data.draw(st.sampled_from(self.sent))
            if proposal in self.from_draft and data.draw(st.booleans()):
                self.from_draft.remove(proposal)
            else:
                self.from_draft.append(proposal)

    @rule(
        prefix_length=st.integers(0, 70),
        tokens=st.lists(st.integers(0, 2 * VOCAB_SIZE), max_size=6),
        good_fingerprint=st.booleans(),
    )
    def a_hostile_drafter_proposes(self, prefix_length: int, tokens: list[int], good_fingerprint: bool) -> None:
        known = self.target.token_ids if self.target is not None else []
        value = 7
        if good_fingerprint and self.target is not None:
            prefix_length, value = len(known), fingerprint(known)
        rubbish = Proposal(prefix_length, value, tuple(tokens), (1.0,) * len(tokens))
        if self.target is not None:
            self.target.stage(rubbish, self.now_s)

    @rule()
    def draft_session_fails(self) -> None:
        if self.drafter is not None:
            self.drafter = None
            error = SessionError(SessionErrorCode.OUT_OF_MEMORY, "no room")
            self.carry_out(self.relay.on_draft_event(error, self.now_s))

    # -- policy, client -----------------------------------------------------------------------------------------

    @rule(k=st.integers(0, 8))
    def policy_changes_its_mind(self, k: int) -> None:
        self.policy.value = k

    @invariant()
    def the_client_reads_plain_decoding(self) -> None:
        if hasattr(self, "expected"):
            assert self.emitted == self.expected[: len(self.emitted)]
            assert self.relay.stats.num_committed == len(self.emitted)
            if self.finish:
                assert self.emitted == self.expected

    def teardown(self) -> None:
        if not hasattr(self, "expected"):
            return
        for _ in range(400):
            if self.finish:
                break
            self.target_receives()
            self.draft_receives()
            self.draft_steps([0], 1)
            if self.from_draft:
                self.carry_out(self.relay.on_draft_event(self.from_draft.pop(0), self.now_s))
            self.target_steps(8)
            self.coordinator_hears_target()
        assert self.emitted == self.expected
        stopped = self.expected[-1] == STOP_TOKEN
        assert self.finish is (FinishReason.STOP if stopped else FinishReason.LENGTH)


SessionMachine.TestCase.settings = settings(max_examples=250, stateful_step_count=60, deadline=None)
TestSessionMachine = SessionMachine.TestCase
