// One answer as text: a span for each token, and what is known of the token that is pointed at.

import { guessesOf } from "./run.js";

const KINDS = {
  drafted: "drafted, accepted",
  branch: "drafted on a branch that caught a miss, accepted",
  lookup: "looked up in the text so far, accepted",
  own: "the target’s own",
};

export class Pane {
  #run = null;
  #current = -1;

  constructor(element, tip) {
    this.element = element;
    this.tip = tip;
    element.addEventListener("pointerover", (event) => this.#onPointer(event));
    element.addEventListener("pointerdown", (event) => this.#onPointer(event));
    element.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && this.#leave());
    element.addEventListener("keydown", (event) => this.#onKey(event));
    element.addEventListener("blur", () => this.#leave());
    element.addEventListener("scroll", () => this.#marked && this.tip.follow(this.#marked));
  }

  /** Shows another run, of this prompt, from its beginning. */
  show(run, prompt) {
    this.#leave();
    this.#run = run;
    const before = document.createElement("span");
    before.className = "prompt";
    before.textContent = prompt;
    this.element.replaceChildren(before);
  }

  /** Adds the tokens that have come since; goes on showing the end if it was shown. */
  update() {
    const { element } = this;
    const atEnd = element.scrollHeight - element.scrollTop - element.clientHeight < 40;
    const spans = document.createDocumentFragment();
    const shown = element.childElementCount - 1;
    for (const token of this.#run.tokens.slice(shown)) spans.append(spanOf(token));
    element.append(spans);
    const last = this.#run.tokens.at(-1);
    if (last) element.lastElementChild.textContent = last.text;
    if (atEnd) element.scrollTop = element.scrollHeight;
  }

  #onPointer(event) {
    const index = [...this.element.children].indexOf(event.target) - 1;
    if (index >= 0) this.#go(index, false);
    else this.#leave();
  }

  #onKey(event) {
    const step = { ArrowRight: 1, ArrowDown: 10, ArrowLeft: -1, ArrowUp: -10, Home: -Infinity, End: Infinity }[event.key];
    if (!this.#run?.tokens.length || step === undefined) return;
    event.preventDefault();
    const last = this.#run.tokens.length - 1;
    this.#go(Math.max(0, Math.min(last, this.#current + step)), true);
  }

  #go(index, byKey) {
    this.#unmark();
    this.#current = index;
    const span = this.#marked;
    span.classList.add("current");
    if (byKey) span.scrollIntoView({ block: "nearest" });
    this.tip.show(describe(this.#run, index), span, byKey);
  }

  #leave() {
    this.#unmark();
    this.#current = -1;
    this.tip.hide();
  }

  #unmark() {
    this.#marked?.classList.remove("current");
  }

  get #marked() {
    return this.#current < 0 ? undefined : this.element.children[this.#current + 1];
  }
}

function spanOf(token) {
  const span = document.createElement("span");
  span.className = `token ${token.kind}`;
  span.textContent = token.text;
  return span;
}

/** What there is to say of a token: {name, lines, rows}. */
function describe(run, index) {
  const token = run.tokens[index];
  const step = run.steps[token.step];
  const lines = [`Token ${index + 1}: ${KINDS[token.kind]}`];
  if (token.logprob !== undefined) {
    const above = token.top.filter(([, logprob]) => logprob > token.logprob).length;
    lines.push(`Probability ${percent(token.logprob)}, ${above ? `number ${above + 1}` : "the most likely"}`);
  }
  lines.push(`Step ${token.step + 1}: ${guessesOf(step)}, K ${step.k}`);
  if (step.step_s) lines.push(`It took ${(step.step_s * 1000).toFixed(1)} ms${missOf(step)}`);
  const rows = token.top.filter(([name]) => name !== token.name).slice(0, 4);
  return { name: visible(token.name), lines, rows: rows.map(([name, logprob]) => [visible(name), percent(logprob)]) };
}

const missOf = (step) => (step.missed ? (step.caught ? " and missed; a branch caught it" : " and missed") : "");

const percent = (logprob) => `${(100 * Math.exp(logprob)).toFixed(logprob < -4.6 ? 2 : 1)} %`;

const visible = (text) => text.replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll(" ", "␣") || "∅";
