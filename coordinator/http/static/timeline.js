// Both workers over time: drafts above, steps below, misses marked.

import { guessesOf } from "./run.js";
import { box, label, picture, replacePicture, rule } from "./svg.js";

const LEFT = 62;
const HEIGHT = 128;
const MAIN = { y: 14, height: 16 };
const BRANCH = { y: 32, height: 8 };
const STEPS = { y: 60, height: 26 };
const SIGN_Y = 102;
const MAX_WIDTH = 30_000; // wider pictures take browsers long, and nobody scrolls that far

/** `pixelsPerMs` as wished; less where the picture would be too wide. */
export function drawTimeline(chart, steps, pixelsPerMs) {
  if (!steps.length) return chart.replaceChildren();
  const drafts = draftsOf(steps);
  const timed = timesOf(steps);
  const firstS = Math.min(timed[0].begin, drafts[0]?.begin ?? Infinity);
  const lastS = steps.at(-1).at_s;
  const scale = Math.min(pixelsPerMs, MAX_WIDTH / (1000 * (lastS - firstS))) * 1000;
  const x = (seconds) => LEFT + (seconds - firstS) * scale;
  const width = Math.max(chart.clientWidth - 2, x(lastS) + 20);
  const parts = [...ruler(firstS, lastS, scale, x), label(6, 28, "draft", "lane"), label(6, 78, "target", "lane")];
  for (const draft of drafts) parts.push(draftBox(draft, x));
  for (const step of timed) parts.push(...stepParts(step, x));
  const misses = steps.filter((step) => step.missed);
  const caught = misses.filter((step) => step.caught).length;
  const told = `${steps.length} steps in ${Math.round(1000 * (lastS - firstS))} ms, ${misses.length} misses, ${caught} caught`;
  replacePicture(chart, picture(width, HEIGHT, told, parts));
}

/** Steps with their begin and end. A step ends before the next one begins, even if the coordinator heard of it late. */
function timesOf(steps) {
  const timed = [];
  let next = Infinity;
  for (const step of [...steps].reverse()) {
    const end = Math.min(step.at_s, next);
    const begin = end - step.step_s;
    next = begin - step.waited_s;
    timed.push({ ...step, waitBegin: next, begin, end });
  }
  return timed.reverse();
}

/** Proposals with an estimated start: drafters do not tell when they began. */
function draftsOf(steps) {
  const proposals = steps.flatMap((step) => step.proposals ?? []);
  const pace = paceOf(proposals);
  let before = -Infinity;
  return proposals.map((proposal) => {
    const begin = Math.max(before, proposal.at_s - pace * proposal.num_tokens);
    before = proposal.at_s;
    return { ...proposal, begin };
  });
}

/** Median seconds of a drafted token, from proposals that followed one another; a millisecond while unknown. */
function paceOf(proposals) {
  const paces = [];
  for (let index = 1; index < proposals.length; index++) {
    const gap = proposals[index].at_s - proposals[index - 1].at_s;
    if (gap > 0) paces.push(gap / proposals[index].num_tokens);
  }
  return paces.sort((a, b) => a - b)[Math.floor(paces.length / 2)] ?? 0.001;
}

function draftBox(draft, x) {
  const { y, height } = draft.branch ? BRANCH : MAIN;
  const title = `${draft.num_tokens} ${draft.branch ? "on a branch" : "drafted"}, from token ${draft.start + 1} on`;
  return box(draft.branch ? "branching" : "proposal", x(draft.begin), y, x(draft.at_s) - x(draft.begin) - 1, height, title);
}

function* stepParts(step, x) {
  const [waitBegin, begin, end] = [step.waitBegin, step.begin, step.end].map(x);
  const took = `${(1000 * step.step_s).toFixed(1)} ms`;
  const title = `${step.numTokens} tokens, ${guessesOf(step)}; ${took}`;
  if (step.waited_s) yield box("waited", waitBegin, STEPS.y + 8, begin - waitBegin, 10, "waited for drafts");
  yield box(step.numDrafted || step.numLookedUp ? "verify" : "free", begin, STEPS.y, end - begin - 1, STEPS.height, title);
  if (end - begin > 11) yield label((begin + end) / 2 - 3, STEPS.y + 17, String(step.numTokens));
  if (step.missed) yield label(end, SIGN_Y, step.caught ? "◆" : "✕", "sign");
}

function* ruler(firstS, lastS, scale, x) {
  const everyMs = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000].find((ms) => (ms / 1000) * scale > 55) ?? 10_000;
  for (let ms = 0; ms <= 1000 * (lastS - firstS); ms += everyMs) {
    yield rule(x(firstS + ms / 1000), 8, x(firstS + ms / 1000), 108);
    yield label(x(firstS + ms / 1000) + 2, 122, `${ms} ms`);
  }
}
