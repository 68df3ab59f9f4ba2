// What is known of one run: its tokens, its steps, and how fast it was. Plain data; nothing here touches the page.

export class Run {
  tokens = []; // {text, kind, step, logprob, top}; kind: "drafted", "branch", "lookup" or "own"
  steps = []; // {number, numTokens, numAccepted, numDrafted, numLookedUp, numLookedUpAccepted, k, ...the server's "step"}
  counts = { drafted: 0, branch: 0, lookup: 0, own: 0 };
  metrics = null;
  finishReason = null;
  #firstMs = 0;
  #lastMs = 0;
  #numFirst = 0;

  /** Takes one chunk of the stream; `nowMs` is when it came. */
  add(chunk, nowMs) {
    const choice = chunk.choices[0];
    if (chunk.metrics) this.metrics = chunk.metrics;
    if (!choice) return;
    if (choice.finish_reason) this.finishReason = choice.finish_reason;
    if (chunk.speculation?.tokens.length) this.#addStep(chunk.speculation, choice.logprobs, nowMs);
    else if (choice.text && this.tokens.length) this.tokens.at(-1).text += choice.text; // what was held back at the end
  }

  #addStep(trace, logprobs, nowMs) {
    const step = {
      number: this.steps.length + 1,
      numTokens: trace.tokens.length,
      numAccepted: trace.tokens.filter((token) => token.drafted).length,
      numDrafted: trace.num_drafted,
      numLookedUp: trace.num_looked_up,
      numLookedUpAccepted: trace.tokens.filter((token) => token.looked_up).length,
      k: trace.k,
      ...trace.step,
    };
    trace.tokens.forEach((token, index) => this.#addToken(token, logprobs, index));
    this.steps.push(step);
    if (!this.#firstMs) [this.#firstMs, this.#numFirst] = [nowMs, this.tokens.length];
    this.#lastMs = nowMs;
  }

  #addToken(token, logprobs, index) {
    const kind = token.branch ? "branch" : token.drafted ? "drafted" : token.looked_up ? "lookup" : "own";
    this.counts[kind] += 1;
    this.tokens.push({
      text: token.text,
      name: logprobs?.tokens[index] ?? token.text,
      kind,
      step: this.steps.length,
      logprob: logprobs?.token_logprobs[index],
      top: Object.entries(logprobs?.top_logprobs[index] ?? {}),
    });
  }

  get text() {
    return this.tokens.map((token) => token.text).join("");
  }

  /** After the first token: as the server measured it once it has ended, until then as the page sees it. */
  get tokensPerSecond() {
    const timing = this.metrics?.timing;
    if (timing) return rate(this.tokens.length - 1, timing.total_s - timing.first_token_s);
    return rate(this.tokens.length - this.#numFirst, (this.#lastMs - this.#firstMs) / 1000);
  }

  get acceptanceRate() {
    return ratio(sum(this.steps, (step) => step.numAccepted), sum(this.steps, (step) => step.numDrafted));
  }

  get tokensPerStep() {
    return ratio(this.tokens.length, this.steps.length);
  }
}

const rate = (count, seconds) => (count > 0 && seconds > 0 ? count / seconds : null);

export const ratio = (part, whole) => (whole ? part / whole : null);

export const sum = (items, of) => items.reduce((total, item) => total + of(item), 0);

/** What a step verified, in words. */
export function guessesOf(step) {
  const told = [];
  if (step.numDrafted) told.push(`${step.numAccepted} of ${step.numDrafted} drafted accepted`);
  if (step.numLookedUp) told.push(`${step.numLookedUpAccepted} of ${step.numLookedUp} looked up accepted`);
  return told.join(", ") || "nothing to verify";
}
