// The page: reads the form, runs the request with and without speculation, and shows both.

import { ApiError, completion, key, servedModel } from "./api.js";
import { drawAcceptance, drawDrafts } from "./charts.js";
import { Pane } from "./pane.js";
import { Run } from "./run.js";
import { drawTimeline } from "./timeline.js";
import { Tip } from "./tip.js";

const NUM_TOP_LOGPROBS = 5;
// While tokens come, drawing takes time from workers on the same machine: text comes in at 20 pictures a second, charts at
// two, of the latest steps only.
const TEXT_PERIOD_MS = 50;
const CHART_PERIOD_MS = 500;
const NUM_LIVE_STEPS = 120;
const RETRY_MS = 2000;

const $ = (id) => document.getElementById(id);
const tip = new Tip($("tip"), $("status"));
const arms = {
  speculative: armOf("speculative"),
  plain: armOf("plain"),
};
let aborter = null; // of the run under way
let chartsDrawnMs = 0;

function armOf(name) {
  const part = (suffix) => $(`${name}-${suffix}`);
  const pane = new Pane(part("text"), tip);
  return { name, pane, rate: part("rate"), meter: part("meter"), figures: part("figures"), run: new Run() };
}

// -- a request -----------------------------------------------------------------------------------------------------

async function run() {
  if (aborter || !$("ask").reportValidity()) return;
  aborter = new AbortController();
  setBusy(true);
  const request = requestOf();
  Object.values(arms).forEach((arm) => reset(arm, request.prompt));
  try {
    await stream(arms.speculative, { ...request, speculation: speculationOf(true) });
    if ($("compare").checked) {
      await stream(arms.plain, { ...request, speculation: speculationOf(false) });
      showVerdict(arms.speculative.run, arms.plain.run);
    }
    say(`done, with seed ${request.seed}`);
  } catch (error) {
    onFailure(error);
  } finally {
    aborter = null;
    Object.values(arms).forEach(paint);
    drawCharts();
    setBusy(false);
  }
}

function requestOf() {
  const number = (id) => Number($(id).value);
  return {
    prompt: $("prompt").value,
    max_tokens: number("max-tokens"),
    temperature: number("temperature"),
    top_p: number("top-p"),
    seed: $("seed").value.trim() ? number("seed") : Math.floor(Math.random() * 2 ** 32), // both runs need the same one
    ignore_eos: $("ignore-eos").checked,
    ...($("logprobs").checked ? { logprobs: NUM_TOP_LOGPROBS } : {}),
  };
}

function speculationOf(enabled) {
  if (!enabled) return { enabled, trace: true };
  const options = { enabled, trace: true };
  if ($("policy").value) options.policy = $("policy").value;
  if ($("k").value) options.k = Number($("k").value);
  return options;
}

async function stream(arm, body) {
  say(`${arm.name} run …`);
  let painting = 0;
  try {
    for await (const chunk of completion(body, aborter.signal)) {
      arm.run.add(chunk, performance.now());
      painting ||= setTimeout(() => {
        painting = 0;
        paint(arm);
        if (performance.now() - chartsDrawnMs > CHART_PERIOD_MS) drawCharts();
      }, TEXT_PERIOD_MS);
    }
  } finally {
    clearTimeout(painting);
    paint(arm);
  }
}

function onFailure(error) {
  if (error.name === "AbortError") return say("stopped");
  if (!(error instanceof ApiError)) throw error;
  say("");
  showError(error.message);
  if (error.status === 401) askKey().then((given) => given && run());
}

// -- what is shown -------------------------------------------------------------------------------------------------

function reset(arm, prompt) {
  arm.run = new Run();
  arm.pane.show(arm.run, prompt);
  $("verdict").hidden = true;
  showError("");
  paint(arm);
}

function paint(arm) {
  const { run } = arm;
  arm.pane.update();
  arm.rate.textContent = run.tokensPerSecond === null ? "–" : run.tokensPerSecond.toFixed(0);
  const fastest = Math.max(1, ...Object.values(arms).map((one) => one.run.tokensPerSecond ?? 0));
  for (const one of Object.values(arms)) one.meter.value = (one.run.tokensPerSecond ?? 0) / fastest;
  arm.figures.textContent = figuresOf(run);
  if (arm === arms.speculative) {
    for (const [kind, count] of Object.entries(run.counts)) $(`count-${kind}`).textContent = count;
  }
}

function figuresOf(run) {
  const parts = [`${run.tokens.length} tokens`];
  if (run.steps.length) parts.push(`${run.steps.length} steps`, `${run.tokensPerStep.toFixed(2)} tokens a step`);
  if (run.acceptanceRate !== null) parts.push(`${Math.round(100 * run.acceptanceRate)} % accepted`);
  if (run.metrics) parts.push(`first after ${Math.round(1000 * run.metrics.timing.first_token_s)} ms`);
  if (run.finishReason) parts.push(`ended by ${run.finishReason}`);
  return run.tokens.length ? parts.join(" · ") : "";
}

function showVerdict(speculative, plain) {
  const [fast, slow] = [speculative.tokensPerSecond, plain.tokensPerSecond];
  const ratio = fast && slow ? `${(fast / slow).toFixed(2)} times plain decoding, as measured here. ` : "";
  $("verdict").textContent = `${ratio}${sameness(speculative, plain)}`;
  $("verdict").hidden = false;
}

function sameness(speculative, plain) {
  const [a, b] = [speculative.text, plain.text];
  if (a === b) return "Both texts are equal, character by character.";
  let at = 0;
  while (a[at] === b[at]) at++;
  return `The texts differ from character ${at + 1} on: a near-tie of two tokens, or a defect.`;
}

function drawCharts() {
  chartsDrawnMs = performance.now();
  drawDrafts($("k-chart"), stepsToDraw());
  drawAcceptance($("acceptance-chart"), stepsToDraw());
  drawTimes();
}

function drawTimes() {
  drawTimeline($("timeline"), stepsToDraw(), Number($("scale").value));
}

const stepsToDraw = () => arms.speculative.run.steps.slice(aborter ? -NUM_LIVE_STEPS : 0);

function say(text) {
  $("status").textContent = text;
}

function showError(message) {
  $("error").textContent = message;
  $("error").hidden = !message;
}

function setBusy(isBusy) {
  $("run").disabled = isBusy;
  $("stop").disabled = !isBusy;
  $("answers").setAttribute("aria-busy", String(isBusy));
}

// -- the server ----------------------------------------------------------------------------------------------------

async function showDeployment() {
  try {
    const model = await servedModel();
    $("deployment").textContent = told(model);
    $("change-key").hidden = !key.get();
  } catch (error) {
    $("deployment").textContent = error.message;
    if (error.status !== 401) setTimeout(showDeployment, RETRY_MS);
    else if (await askKey()) await showDeployment();
  }
}

function told(model) {
  const drafts = model.draft_models.length ? `drafted by ${model.draft_models.join(", ")}` : "no draft worker is up";
  return `${model.id}, ${drafts}; policy ${model.policy}, K up to ${model.max_k}, context ${model.max_model_len}`;
}

/** Asks for the API key; true if one was given. */
function askKey() {
  const dialog = $("key-dialog");
  $("key").value = key.get();
  if (!dialog.open) dialog.showModal();
  return new Promise((resolve) => {
    const onClose = () => {
      const given = dialog.returnValue === "save";
      if (given) key.set($("key").value.trim());
      dialog.returnValue = "";
      $("change-key").hidden = false;
      resolve(given);
    };
    dialog.addEventListener("close", onClose, { once: true });
  });
}

// -- events --------------------------------------------------------------------------------------------------------

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  run();
});
$("stop").addEventListener("click", () => aborter?.abort());
$("scale").addEventListener("input", drawTimes);
$("change-key").addEventListener("click", async () => (await askKey()) && showDeployment());
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) run();
  if (event.key === "Escape") {
    tip.hide();
    aborter?.abort();
  }
});

showDeployment();
