"""The target's side of one session: what is staged, what to verify next, what a step committed.

The life of a step for one session, with ``n`` committed tokens of which the last has not been through the model yet:

1. ``drafted = session.drafted(k)``: up to ``k`` staged tokens, never past the end of the sequence.
2. The model runs the last committed token and ``drafted``; the target draws a token for each of the
   ``len(drafted) + 1`` rows, exactly as it would in plain decoding.
3. ``session.conclude(drafted, draws)``: a drafted token is accepted while it equals the target's draw; then follows
   the target's own token. The result does not depend on ``drafted``, only how many tokens one step commits does.

That is the coupled method. By the others (`speculation.ratio`) the target keeps drafted tokens by probabilities; the
draws of step 2 are then the tokens that it keeps and its own, which is never the one that it refused. What follows is
the same for all methods.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from speculation.acceptance import AcceptanceProfile
from speculation.confidence import ConfidenceStatistics
from speculation.draft_distribution import DraftDistribution, one_hot
from speculation.draft_tree import DraftTree, Graft
from speculation.experience import Experience
from speculation.messages import MAX_PROPOSAL_TOKENS, FinishReason, OpenTarget, Proposal, TokenId, Verdict
from speculation.pace import DraftPace
from speculation.prompt_lookup import NOTHING, LookedUp, PromptLookup
from speculation.turns import Turn

MAX_K = 256
"""A greater K is cut to this: whatever a coordinator asks for, planning a step stays cheap."""


class VerifierSession:
    """Committed and staged tokens of one session at the target."""

    def __init__(self, command: OpenTarget, vocab_size: int, experience: Experience) -> None:
        """``experience`` is the worker's: the session starts from it and adds to it.

        Nothing is looked up where a session takes turns, or verifies by ratios: those judge a token by what it was
        drawn from. K does not bound it: a drafter that is no good says nothing of the text.
        """
        self.sampling = command.sampling
        self.prompt_length = command.sampling.prompt_length or len(command.token_ids)
        self.set_k(command.k)
        self.profile = AcceptanceProfile(experience.profile)
        self.pace = DraftPace(experience.pace)
        self._shared_profile = experience.profile
        self._confidence = ConfidenceStatistics(experience.confidence)
        self._vocab_size = vocab_size
        self._tree = DraftTree(command.token_ids)
        self._max_length = command.max_length
        self._stop_token_ids = frozenset(command.stop_token_ids)
        self._num_dropped = 0
        self._num_late = self._num_late_right = 0
        self._takes_turns = command.turns
        self._max_lookup = 0 if command.turns or command.sampling.by_ratio else min(command.max_lookup, MAX_K)
        lookups = experience.lookups if self._max_lookup else None
        self._lookup = PromptLookup(lookups) if lookups is not None else None
        self.logprobs = command.logprobs
        self._prompt_logprobs = command.prompt_logprobs
        self._last_verdict_s: float | None = None
        self._missed = False  # with that verdict

    def set_k(self, k: int) -> None:
        """Verify at most ``k`` drafted tokens in one step from now on."""
        self.k = min(k, MAX_K)
        self._on_other_guesses()

    def _on_other_guesses(self) -> None:
        """What is staged has changed, or K, or what is known."""
        self._looked_up: LookedUp | None = None  # behind the first K staged tokens; None: not looked for yet
        self._survival: tuple[float, ...] | None = None

    @property
    def token_ids(self) -> Sequence[TokenId]:
        """Committed tokens, prompt included."""
        return self._tree.token_ids

    @property
    def prompt_logprobs(self) -> int | None:
        """How many of the most likely tokens to tell at each place of the prompt; None: nothing of it, or no more."""
        return self._prompt_logprobs if self._last_verdict_s is None else None

    def stage(self, proposal: Proposal, now_s: float) -> Graft:
        """Keeps what is live of a proposal. A malformed one is dropped like a stale one: drafts are hints."""
        graft = self._graft(self._credible(proposal) if self.sampling.by_ratio else proposal.without_distributions())
        self._num_dropped += len(proposal.token_ids) - graft.num_new
        self._on_other_guesses()
        if not self.sampling.by_ratio:  # what would have been kept by a ratio need not be what was drawn without it
            self._learn_late(graft.num_late, graft.num_late_right)
        if not proposal.is_branch:  # branches come when the drafter has time for them: they tell nothing of its pace
            self.pace.on_proposal(now_s, graft.num_new)  # 0 too: the drafter is alive, and starts again
        elif graft.num_new and self._tree.main_line(1):
            self.pace.on_branch(now_s)
        return graft

    def _graft(self, proposal: Proposal) -> Graft:
        if not 0 < len(proposal.token_ids) <= MAX_PROPOSAL_TOKENS or max(proposal.token_ids) >= self._vocab_size:
            return Graft()
        return self._tree.graft(proposal)

    def _credible(self, proposal: Proposal) -> Proposal:
        """Cut before the first token that no valid distribution came with, unless the drafter takes its best ones.

        Not dropped whole: whether a token counts must not depend on what follows from its being that token.
        """
        if not proposal.distributions and not self.sampling.needs_q and not proposal.is_branch:
            return proposal
        num_credible, pairs = 0, zip(proposal.token_ids, proposal.distributions, strict=False)
        for token_id, distribution in () if proposal.is_branch else pairs:
            if not distribution.is_valid(token_id, self._vocab_size, self.sampling.draft_top_n):
                break
            num_credible += 1
        return dataclasses.replace(
            proposal,
            token_ids=proposal.token_ids[:num_credible],
            distributions=proposal.distributions[:num_credible],
        )

    @property
    def num_staged(self) -> int:
        """Staged tokens that could still be verified."""
        return len(self._staged(self._max_length))

    @property
    def turn(self) -> Turn | None:
        """What the next step waits for, if the session takes turns. The first token never waits for the drafter."""
        if not self._takes_turns or self._last_verdict_s is None:
            return None
        return Turn(min(self.k, self._max_drafted), self._last_verdict_s)

    @property
    def takes_turns(self) -> bool:
        """Draft, then verify: the next step waits for all of its drafts."""
        return self._takes_turns

    @property
    def lacks_drafts(self) -> bool:
        """The last step left nothing staged, and the drafter has to start again: the next one may wait for it."""
        return self.k > 0 and self._missed and not self._tree.main_line(1)

    @property
    def _max_drafted(self) -> int:
        """Leaves room for the target's own token."""
        return self._max_length - len(self.token_ids) - 1

    def _staged(self, k: int) -> list[TokenId]:
        return self._tree.main_line(min(k, self._max_drafted))

    @property
    def survival(self) -> tuple[float, ...]:
        """P(the first d drafted tokens are accepted) for d = 1 .. K: of the staged ones by how sure the drafter was.

        By ratios they are all alike: how many are verified must not depend on which they are.
        """
        if self._survival is None:
            usual = self.profile.survival(self.k)
            known = [] if self.sampling.by_ratio else self._tree.main_line_confidences(min(self.k, self._max_drafted))
            self._survival = self._confidence.survival(known, usual)
        return self._survival

    def _behind_staged(self) -> LookedUp:
        """What was looked up for the rest of the step."""
        if self._lookup is None:
            return NOTHING
        if self._looked_up is None:
            staged = self._staged(self.k)
            num_tokens = min(self._max_lookup, self._max_drafted) - len(staged)
            self._looked_up = self._lookup.find(self.token_ids, staged, num_tokens)
        return self._looked_up

    @property
    def lookup_chances(self) -> tuple[float, ...]:
        """P(the first d tokens looked up behind the staged ones are right, if those are) for d = 1, 2, ..."""
        return self._lookup.chances(self._behind_staged()) if self._lookup is not None else ()

    def drafted(self, k: int) -> list[TokenId]:
        """Up to ``k`` tokens to verify, never past the end of the sequence: staged ones, at most K, then looked-up."""
        staged = self._staged(min(k, self.k))
        return [*staged, *self._behind_staged().token_ids[: k - len(staged)]] if len(staged) < k else staged

    def num_drafted(self, num_tokens: int) -> int:
        """How many of the first ``num_tokens`` of `drafted` are a drafter's: the first ones."""
        return num_tokens if self._lookup is None else len(self._staged(min(num_tokens, self.k)))

    def staged_behind(self, drafted: Sequence[TokenId]) -> list[tuple[TokenId, DraftDistribution]]:
        """``drafted`` and, if there is one, the token staged behind them, each with what it was drawn from."""
        num_tokens = len(drafted) + 1
        line = zip(self._tree.main_line(num_tokens), self._tree.main_line_distributions(num_tokens), strict=True)
        return [(token_id, distribution or one_hot(token_id)) for token_id, distribution in line]

    def conclude(self, drafted: Sequence[TokenId], draws: Sequence[TokenId], now_s: float) -> Verdict:
        """Commits the outcome of a step.

        ``draws[i]`` is the target's token after the committed tokens and ``drafted[:i]``; one more than ``drafted``.
        """
        num_right = 0
        while num_right < len(drafted) and drafted[num_right] == draws[num_right]:
            num_right += 1
        num_drafted = self.num_drafted(len(drafted))
        start = len(self.token_ids)
        committed, finish_reason = self._cut_at_end(draws[: num_right + 1], start)
        num_right = min(num_right, len(committed))
        num_accepted = min(num_right, num_drafted)
        missed = finish_reason is None and self._learn_from(committed, num_drafted, num_accepted)
        num_contradicted = self._tree.commit(committed)
        self._on_other_guesses()
        self.pace.on_verdict(now_s, self.num_staged, missed)
        self._last_verdict_s, self._missed = now_s, missed
        verdict = Verdict(
            start=start,
            token_ids=committed,
            num_drafted=num_drafted,
            num_accepted=num_accepted,
            num_looked_up=len(drafted) - num_drafted,
            num_looked_up_accepted=num_right - num_accepted,
            num_staged=self.num_staged,
            num_dropped=self._num_dropped + num_contradicted,
            finish_reason=finish_reason,
            num_late=self._num_late,
            num_late_right=self._num_late_right,
            missed=missed,
            caught=missed and self.num_staged > 0,
        )
        self._num_dropped = self._num_late = self._num_late_right = 0
        return verdict

    def brought_up_to_date(self, verdict: Verdict) -> Verdict:
        """``verdict``, the last one, with what has been staged since: nobody has heard of it yet."""
        if verdict.finish_reason is not None or verdict.num_staged == self.num_staged:
            return verdict
        return dataclasses.replace(verdict, num_staged=self.num_staged, caught=verdict.missed and self.num_staged > 0)

    def _learn_from(self, committed: Sequence[TokenId], num_drafted: int, num_accepted: int) -> bool:
        """From a step that the session outlives. Did it contradict the drafter?"""
        self._learn(num_drafted, num_accepted)
        self._learn_confidence(committed)
        if self._lookup is not None and self._looked_up is not None:  # also of what the step did not take
            self._lookup.observe(self._looked_up, committed[len(self._staged(self.k)) :])
        return num_accepted < num_drafted or self._contradicts_next_staged(num_drafted, committed[num_drafted:])

    def _learn_confidence(self, committed: Sequence[TokenId]) -> None:
        """Of all staged tokens that were decided, whether the step took them or not."""
        if self.sampling.by_ratio:  # judged otherwise
            return
        line, said = self._tree.main_line(len(committed)), self._tree.main_line_confidences(len(committed))
        for token_id, decided, confidence in zip(line, committed, said, strict=False):
            if confidence is not None:
                self._confidence.observe(confidence, token_id == decided)
            if token_id != decided:
                break

    def _contradicts_next_staged(self, num_drafted: int, decided: Sequence[TokenId]) -> bool:
        """A staged token that the step did not take says as much of the drafter as one that it did.

        ``decided`` is the target's own token, behind what it had looked up.
        """
        line = self._tree.main_line(num_drafted + len(decided))[num_drafted:]
        num_right = 0
        while num_right < len(line) and line[num_right] == decided[num_right]:
            num_right += 1
        self._learn_late(min(num_right + 1, len(line)), num_right)
        return num_right < len(line)

    def _learn_late(self, num_late: int, num_right: int) -> None:
        self._num_late += num_late
        self._num_late_right += num_right
        self._learn(num_late, num_right)

    def _learn(self, num_drafted: int, num_right: int) -> None:
        for profile in (self.profile, self._shared_profile):
            profile.observe(num_drafted, num_right)

    def _cut_at_end(self, token_ids: Sequence[TokenId], start: int) -> tuple[tuple[TokenId, ...], FinishReason | None]:
        """What is left of ``token_ids`` when nothing may follow a stop token or ``max_length``."""
        for index, token_id in enumerate(token_ids):
            if token_id in self._stop_token_ids:
                return tuple(token_ids[: index + 1]), FinishReason.STOP
        reason = FinishReason.LENGTH if start + len(token_ids) >= self._max_length else None
        return tuple(token_ids), reason
