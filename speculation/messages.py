"""The messages between coordinator and workers, as plain data.

They mirror ``protos/draft.proto`` and ``protos/target.proto`` (which say what each field means to the other side);
the codecs of ``rpc`` translate. Nothing here checks values: whoever receives a message does.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace
from typing import NewType, TypeAlias

from speculation.draft_distribution import DraftDistribution

SessionId = NewType("SessionId", int)
TokenId: TypeAlias = int


GREEDY_BELOW = 1e-5
"""Lower temperatures are greedy, as in `inference.sampling`."""


class Method(enum.Enum):
    """How drafted tokens are verified; docs/exactness.md says what each of them promises."""

    COUPLED = "coupled"
    """Kept while they are what the target draws with the same noise."""
    REJECTION = "rejection"
    """Kept with probability min(1, p/q), token by token."""
    BLOCK = "block"
    """Kept by the ratio of whole beginnings of the chain."""
    UNKNOWN = ""
    """Asked for by a newer peer."""


@dataclass(frozen=True, slots=True)
class Grammar:
    """What an answer has to look like; see ``Grammar`` in ``common.proto``."""

    kind: str
    """"json_schema", "json_object", "regex" or "ebnf"."""
    text: str


@dataclass(frozen=True, slots=True)
class Sampling:
    """How one sequence is sampled. ``temperature`` 0 is greedy, ``top_k`` 0 and ``top_p`` 1 are off."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[TokenId, float], ...] = ()
    bad_words: tuple[tuple[TokenId, ...], ...] = ()
    min_length: int = 0
    """No stop token is drawn before prompt and output have so many tokens."""
    prompt_length: int = 0
    """Where the output begins; 0: behind the tokens that the session is opened with."""
    grammar: Grammar | None = None
    method: Method = Method.COUPLED
    draft_top_n: int = 0
    """Tokens in a drafter's distribution, for the methods that need one."""

    @property
    def by_ratio(self) -> bool:
        """Drafts are kept by p/q. At temperature 0 all methods are one: a draft stays if it is the best token."""
        return self.method is not Method.COUPLED and self.temperature >= GREEDY_BELOW

    @property
    def needs_q(self) -> bool:
        """Proposals carry what they were drawn from; else the drafter takes its best token, of which q is one-hot."""
        return self.by_ratio and self.draft_top_n != 1


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Of the token at one position, and the most likely ones there, best first."""

    logprob: float
    top: tuple[tuple[TokenId, float], ...] = ()


@dataclass(frozen=True, slots=True)
class LogprobOptions:
    """Which logprobs are wanted: the committed token's and ``num_top`` more, of the model's own distribution or of the
    one that is drawn from."""

    num_top: int = 0
    processed: bool = False


MAX_PROPOSAL_TOKENS = 256
"""A longer proposal is malformed."""


@dataclass(frozen=True, slots=True)
class Proposal:
    """A chain of drafted tokens at positions ``[prefix_length, prefix_length + len(token_ids))``."""

    prefix_length: int
    prefix_fingerprint: int
    token_ids: tuple[TokenId, ...]
    confidences: tuple[float, ...]
    is_branch: bool = False
    """Not what the drafter believes, but what it has ready should the main line be wrong there."""
    distributions: tuple[DraftDistribution, ...] = ()
    """What each token was drawn from, if `Sampling.needs_q`."""
    num_committed: int = 0
    """Committed tokens that the drafter knew of when this left; 0: it does not say."""
    held_s: float = 0.0
    """Seconds for which it had known of the last of them."""

    def without_distributions(self) -> Proposal:
        """For who has no use for them, and has not looked whether they are as many as the tokens, or valid."""
        return replace(self, distributions=()) if self.distributions else self


class FinishReason(enum.Enum):
    """Why the target ended a session."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one verify step committed for one session: positions ``[start, start + len(token_ids))``.

    The first ``num_accepted`` tokens were drafted, the next ``num_looked_up_accepted`` looked up in the sequence. The
    last is the target's own, except when an accepted one ended the session.
    """

    start: int
    token_ids: tuple[TokenId, ...]
    num_drafted: int
    num_accepted: int
    num_staged: int
    num_dropped: int = 0
    finish_reason: FinishReason | None = None
    num_late: int = 0
    """Drafted tokens that were decided unverified since the last verdict, up to the first wrong one."""
    num_late_right: int = 0
    missed: bool = False
    """The step contradicted the main line: a drafted token that it verified, or the staged one behind those."""
    caught: bool = False
    """It missed, and a branch was staged that goes on from the target's own token."""
    logprobs: tuple[TokenLogprobs, ...] = ()
    """As many as ``token_ids`` if the session asked for them."""
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    """In a session's first verdict, if it asked: of the prompt's tokens from the second on."""
    num_looked_up: int = 0
    """Tokens that the step verified behind the drafted ones: the target itself had found them in the sequence."""
    num_looked_up_accepted: int = 0


@dataclass(frozen=True, slots=True)
class StepReport:
    """What the step behind a frame of verdicts cost."""

    step_s: float
    num_sessions: int
    num_tokens: int
    waited_s: float = 0.0


class SessionErrorCode(enum.Enum):
    """Values equal the names in ``SessionError.Code``."""

    INVALID = "INVALID"
    UNKNOWN_SESSION = "UNKNOWN_SESSION"
    DUPLICATE_SESSION = "DUPLICATE_SESSION"
    CONTEXT_OVERFLOW = "CONTEXT_OVERFLOW"
    OUT_OF_MEMORY = "OUT_OF_MEMORY"
    INTERNAL = "INTERNAL"


@dataclass(frozen=True, slots=True)
class SessionError:
    """The worker has dropped the session; other sessions go on."""

    code: SessionErrorCode
    message: str


@dataclass(frozen=True, slots=True)
class OpenTarget:
    """Start (or, with committed tokens behind the prompt, resume) a session at a target worker."""

    token_ids: tuple[TokenId, ...]
    sampling: Sampling
    max_length: int
    stop_token_ids: tuple[TokenId, ...]
    k: int
    turns: bool = False
    """Verify nothing before K tokens are staged; see `speculation.turns`."""
    logprobs: LogprobOptions | None = None
    prompt_logprobs: int | None = None
    """So many of the most likely tokens at each place of the prompt; None: nothing of the prompt."""
    fork_of: SessionId = SessionId(0)
    """Shares the prompt's keys and values with this session of the same connection, if it can; 0 is none."""
    trace_context: str = ""
    """W3C traceparent of the request; empty: not traced."""
    max_lookup: int = 0
    """Tokens looked up in the sequence that may fill a step, with the drafted ones; 0: none."""


@dataclass(frozen=True, slots=True)
class OpenDraft:
    """Start or resume drafting. ``max_length`` 0 is no limit."""

    token_ids: tuple[TokenId, ...]
    sampling: Sampling
    lookahead: int
    max_length: int = 0
    max_branches: int = 0
    stop_token_ids: tuple[TokenId, ...] = ()
    """Not drawn before ``Sampling.min_length``."""
    trace_context: str = ""


@dataclass(frozen=True, slots=True)
class Commit:
    """The target has decided the tokens at ``[start, start + len(token_ids))``."""

    start: int
    token_ids: tuple[TokenId, ...]
    gather_s: float = 0.0
    """Seconds for which drafts may gather and still leave the coordinator in time; 0: they are to come at once."""


@dataclass(frozen=True, slots=True)
class SetK:
    """Cap on drafted tokens verified in one step of this session."""

    k: int


@dataclass(frozen=True, slots=True)
class SetLookahead:
    """Cap on drafted tokens beyond the committed ones; 0 pauses drafting."""

    lookahead: int


@dataclass(frozen=True, slots=True)
class CloseSession:
    """End a session at a worker; unknown sessions are ignored."""


TargetCommand: TypeAlias = OpenTarget | Proposal | SetK | CloseSession
TargetEvent: TypeAlias = Verdict | SessionError
DraftCommand: TypeAlias = OpenDraft | Commit | SetLookahead | CloseSession
DraftEvent: TypeAlias = Proposal | SessionError


@dataclass(frozen=True, slots=True)
class TargetFrame:
    """What a target worker sends after one step; ``step`` is None when there was none (only errors)."""

    items: tuple[tuple[SessionId, TargetEvent], ...]
    step: StepReport | None = None
    gather_s: float = 0.0
    """Seconds for which commands may gather at the coordinator and be here when the step that begins now is over; 0:
    they are to come at once."""
    num_heard: int = 0
    """Commands of this connection that had been looked at before."""
    drafts_at_once: bool = False
    """Drafts may come so late that they should not gather at the drafter, although commands do at the coordinator."""


@dataclass(frozen=True, slots=True)
class Heard:
    """What a coordinator had had of the target when it sent a frame."""

    num_frames: int = 0
    """On this connection; 0: it does not say."""
    held_s: float = 0.0
    """Seconds since the last of them."""


NOTHING_HEARD = Heard()


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """How a chat becomes a prompt: a Jinja template, and the special tokens that it may call by name."""

    source: str
    special_tokens: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What a worker serves; see ``ModelInfo`` in ``common.proto``."""

    name: str
    vocab_size: int
    max_context: int
    eos_token_ids: tuple[TokenId, ...]
    num_parameters: int
    dtype: str
    device: str
    tokenizer_sha256: bytes
    tokenizer_size: int
    chat_template: ChatTemplate | None = None
