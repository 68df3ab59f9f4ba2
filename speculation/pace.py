"""What waiting costs: when drafts will be here. Learned online, from medians of a few recent times as in `cost`."""

from __future__ import annotations

from collections import deque

from speculation.cost import lower_median

PACE_SAMPLES = 9
"""Recent times behind a pace's median."""

PACE_PRIOR_SAMPLES = 2
"""Samples that the prior counts for in a new session."""

MAX_FREE_RUNS = 8
"""A first token that took more verdicts than this says that the drafter was paused or lost, not how fast it is."""

TOKEN_PATIENCE = 3.0
"""Token times after which a further token counts as not coming: the drafter is at its lookahead, or gone."""

REDRAFT_PATIENCE = 2.0
"""Times ``redraft_s`` after which a first token counts as not coming."""


class DraftPace:
    """When will drafts of one session be here? Learned at the target from verdicts and arrivals.

    Two times, both medians: ``redraft_s``, from a verdict that missed and left nothing staged to the first live
    drafted token (a round trip, drafting, queueing), and ``token_s`` per further token. Verdicts of free-runs do not
    restart the clock: the drafter has been at it since the miss.
    """

    def __init__(self, prior: DraftPace | None = None) -> None:
        """Starts from ``prior``'s times and passes its own samples on to it."""
        self._prior = prior
        self._redraft: deque[float] = deque(maxlen=PACE_SAMPLES)
        self._token: deque[float] = deque(maxlen=PACE_SAMPLES)
        self._redraft_s: float | None = None  # medians of the two
        self._token_s: float | None = None
        if prior is not None and prior.redraft_s is not None:
            self._redraft.extend([prior.redraft_s] * PACE_PRIOR_SAMPLES)
            self._redraft_s = prior.redraft_s
        if prior is not None and prior._token_s is not None:
            self._token.extend([prior._token_s] * PACE_PRIOR_SAMPLES)
            self._token_s = prior._token_s
        self._empty_since: float | None = None  # the verdict that left nothing staged; None: something came since
        self._restarted = 0.0  # the verdict from which the drafter is known to have started again; that one or later
        self._last_verdict: float | None = None
        self._missed = False  # that verdict was a miss
        self._gathers_since: float | None = None  # what comes later was told to gather
        self._num_free_runs = 0  # verdicts since that one
        self._last_arrival: float | None = None
        self._in_burst = False  # nothing but arrivals since the last one
        self._num_at_once = 0  # tokens of the burst that came at the very time of `_last_arrival`, after the first

    @property
    def redraft_s(self) -> float | None:
        """Seconds from a miss to the first live drafted token; None while unknown."""
        return self._redraft_s

    @property
    def token_s(self) -> float | None:
        """Seconds per further token; until that is known at most ``redraft_s``."""
        return self._redraft_s if self._token_s is None else self._token_s

    def on_verdict(self, now_s: float, num_staged: int, missed: bool = True) -> None:
        """A verdict left ``num_staged`` tokens staged.

        ``missed``: it contradicted a draft (staged tokens were rejected or dropped), so that the drafter has to start
        again; after a verdict that agreed with all of them more may be on its way. During a free-run of an empty
        session neither is known, and it does not matter.
        """
        self._in_burst, self._last_verdict = False, now_s
        if num_staged > 0:
            self._empty_since = None
        elif self._empty_since is not None:
            self._num_free_runs += 1
        else:
            self._empty_since = self._restarted = now_s
            self._missed, self._num_free_runs, self._gathers_since = missed, 0, None

    def on_gathering(self, now_s: float) -> None:
        """From now on drafts gather until a step is over: when the first comes says nothing of how soon it could."""
        if self._gathers_since is None:
            self._gathers_since = now_s

    def on_proposal(self, now_s: float, num_tokens: int) -> None:
        """``num_tokens`` live drafted tokens arrived at ``now_s`` (when they arrived, not when they were looked at).

        0 is a sign of life: a proposal arrived, but a free-run had contradicted it. So the drafter has to start again.
        """
        if num_tokens == 0:
            self._restart()
            return
        if self._empty_since is not None:
            gathered = self._gathers_since is not None and now_s > self._gathers_since
            is_typical = self._missed and not gathered and self._num_free_runs <= MAX_FREE_RUNS
            if is_typical and now_s > self._empty_since:
                self._learn_redraft(now_s - self._empty_since)
            self._empty_since, self._in_burst = None, False
        if not self._in_burst or self._last_arrival is None:
            self._num_at_once = 0
        elif now_s > self._last_arrival:
            self._learn_token((now_s - self._last_arrival) / (self._num_at_once + num_tokens))
            self._num_at_once = 0
        else:
            self._num_at_once += num_tokens
        self._last_arrival, self._in_burst = now_s, True

    def on_branch(self, now_s: float) -> None:
        """A branch brought tokens to a session that had none: it lacks drafts no more, and nothing is learned.

        Were the clock left running, the next first token would be timed from a miss long before its own.
        """
        if self._empty_since is not None:
            self._empty_since, self._in_burst, self._last_arrival = None, False, now_s

    def _restart(self) -> None:
        """Only what is expected starts again, not what is measured: were a slow drafter's time taken from the last
        verdict it would seem fast, and be waited for."""
        if self._empty_since is not None and self._last_verdict is not None:
            self._restarted, self._missed = self._last_verdict, self._missed or self._num_free_runs > 0

    def _learn_redraft(self, sample_s: float) -> None:
        self._redraft.append(sample_s)
        self._redraft_s = lower_median(self._redraft)
        if self._prior is not None:
            self._prior._learn_redraft(sample_s)

    def _learn_token(self, sample_s: float) -> None:
        self._token.append(sample_s)
        self._token_s = lower_median(self._token)
        if self._prior is not None:
            self._prior._learn_token(sample_s)

    def expected_wait_s(self, num_tokens: int, now_s: float) -> float | None:
        """Expected seconds from ``now_s`` until ``num_tokens`` more tokens have arrived.

        None while unknown, and when drafts are so late that they must be counted out. Between due and counted out the
        expectation grows with the delay: who is late by x is as likely as not late by x more.
        """
        token_s, redraft_s = self.token_s, self.redraft_s
        if token_s is None or redraft_s is None:
            return None
        if self._empty_since is None:
            since_s, first_s, patience = self._last_arrival, token_s, TOKEN_PATIENCE
        elif self._missed:
            since_s, first_s, patience = self._restarted, redraft_s, REDRAFT_PATIENCE
        else:
            since_s, first_s, patience = self._restarted, token_s, TOKEN_PATIENCE
        if since_s is None or now_s > since_s + patience * first_s:
            return None
        late_s = now_s - (since_s + first_s)
        return (-late_s if late_s < 0.0 else max(late_s, token_s)) + (num_tokens - 1) * token_s
