// Charts by step: drafted tokens under the cap K, and the acceptance rate.

import { ratio, sum } from "./run.js";
import { box, label, picture, replacePicture, rule, svg } from "./svg.js";

const STEP = 8;
const LEFT = 34;
const HEIGHT = 96;
const FLOOR = 80;
const CEILING = 8;
const WINDOW = 16;

/** A bar for each step: its accepted drafted tokens, its rejected ones on top; K as a line. */
export function drawDrafts(chart, steps) {
  const most = Math.max(1, ...steps.map((step) => Math.max(step.k, step.numDrafted)));
  const unit = (FLOOR - CEILING) / most;
  const parts = [...axis(steps, [[0, "0"], [1, String(most)]])];
  steps.forEach((step, index) => {
    const x = LEFT + index * STEP;
    const accepted = step.numAccepted * unit;
    const rejected = (step.numDrafted - step.numAccepted) * unit;
    if (accepted) parts.push(box("accepted", x, FLOOR - accepted, STEP - 2, accepted));
    if (rejected > 0) parts.push(box("rejected", x + 0.5, FLOOR - accepted - rejected, STEP - 3, rejected));
  });
  const cap = steps.map((step, index) => `${LEFT + index * STEP},${FLOOR - step.k * unit} h${STEP}`);
  if (cap.length) parts.push(svg("path", { class: "k", d: `M${cap.join(" L")}` }));
  const accepted = sum(steps, (step) => step.numAccepted);
  const told = `${steps.length} steps; ${accepted} of ${sum(steps, (step) => step.numDrafted)} drafted tokens accepted`;
  replacePicture(chart, picture(widthFor(chart, steps.length), HEIGHT, told, parts));
}

/** The share of the drafted tokens of the last steps that were accepted. */
export function drawAcceptance(chart, steps) {
  const points = [];
  let latest = null;
  for (let index = 0; index < steps.length; index++) {
    const recent = steps.slice(Math.max(0, index + 1 - WINDOW), index + 1);
    latest = ratio(sum(recent, (step) => step.numAccepted), sum(recent, (step) => step.numDrafted));
    if (latest !== null) points.push(`${LEFT + index * STEP},${FLOOR - latest * (FLOOR - CEILING)}`);
  }
  const parts = [...axis(steps, [[0, "0 %"], [0.5, "50"], [1, "100"]])];
  parts.push(svg("polyline", { class: "rate-line", points: points.join(" ") }));
  const told = latest === null ? "nothing was drafted" : `${Math.round(100 * latest)} % of the latest drafts accepted`;
  replacePicture(chart, picture(widthFor(chart, steps.length), HEIGHT, told, parts));
}

function* axis(steps, marks) {
  const right = LEFT + Math.max(steps.length, 1) * STEP;
  for (const [share, text] of marks) {
    const y = FLOOR - share * (FLOOR - CEILING);
    yield rule(LEFT, y, right, y);
    yield label(4, y + 4, text);
  }
  for (const [index, { number }] of steps.entries()) {
    if (number % 10 === 0) yield label(LEFT + index * STEP - 2, HEIGHT - 3, String(number));
  }
}

const widthFor = (chart, numSteps) => Math.max(chart.clientWidth - 2, LEFT + numSteps * STEP + 8);
