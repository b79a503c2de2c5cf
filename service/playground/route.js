// Draws a route: who answers, what was expected of every expert, and why.

import { at, make, number, percent } from "./dom.js";

const name = (expert) => make("strong", "", expert);

const listed = (experts) => experts.flatMap(({ expert }, i) => [i ? (i < experts.length - 1 ? ", " : " and ") : "", name(expert)]);

const REASONS = {
  top_score: ({ expert, experts, margin }) => {
    const chosen = experts.filter(({ selected }) => selected);
    if (chosen.length > 1) return [...listed(chosen), " answer as one, token by token."];
    if (experts.length === 1) return [name(expert), " is the only expert."];
    return [name(expert), ` has the highest score, ${number(margin)} ahead of ${runnerUp(experts)}.`];
  },
  no_evidence: ({ expert }) => ["The prompt says nothing about the experts, so the default answers: ", name(expert), "."],
  abstained: ({ expert, experts, confidence }) => [
    `The router is not sure enough of ${runnerUp(experts)} (${percent(confidence)}), so the default answers: `, name(expert), ".",
  ],
  only_choice: ({ expert }) => ["No other expert may answer this than ", name(expert), "."],
  fixed: ({ expert }) => ["This router sends every prompt to one expert: ", name(expert), "."],
  pinned: ({ expert }) => ["You chose ", name(expert), ", so nothing is routed."],
  retained: ({ expert, experts, margin }) => [
    "The conversation stays with ", name(expert),
    margin < 0 ? `: ${runnerUp(experts)} is ${number(-margin)} ahead, too little to switch.` : ", still the best.",
  ],
  switched: ({ expert }) => ["The conversation moves to ", name(expert), ": who had it may not answer this, or is clearly behind."],
  fallback: ({ expert }) => ["The first choice failed before its first word, so ", name(expert), " answers."],
};

const EXCLUDED = {
  not_allowed: "not allowed",
  denied: "denied",
  context_window: "prompt over its window",
  not_ready: "not ready",
};

const EVIDENCE = {
  gates: () => "How alike the prompt is to what each gate stands for.",
  clusters: ({ prompts }) => `The mean of the ${prompts} prompts in the nearest cluster.`,
  neighbours: ({ prompts }) => `The mean of the ${prompts} nearest prompts with known scores.`,
  weights: () => "A formula of the whole prompt, fitted on prompts with known scores: none of them counts more than another.",
  none: () => "Nothing: this router does not read the prompt.",
};

export class RouteCard {
  #route = null;
  #rows = new Map(); // kept by expert, so that bars grow instead of being drawn anew

  constructor() {
    at("measure").addEventListener("change", () => this.#drawBars());
  }

  wait() {
    at("route").setAttribute("aria-busy", "true");
  }

  rest() {
    at("route").removeAttribute("aria-busy");
  }

  // More that is known of the route that is shown.
  add(route) {
    this.show({ ...this.#route, ...route });
  }

  clear() {
    this.rest();
    at("routeBody").hidden = at("routeError").hidden = true;
    at("routeHint").hidden = false;
    at("routeMeta").textContent = "";
  }

  fail(message) {
    this.rest();
    at("routeError").textContent = message;
    at("routeError").hidden = false;
    at("routeHint").hidden = true;
    at("routeBody").classList.add("stale");
  }

  show(route) {
    this.#route = route;
    this.rest();
    at("routeError").hidden = at("routeHint").hidden = true;
    at("routeBody").hidden = false;
    at("routeBody").classList.remove("stale");
    at("routeMeta").textContent = `${route.router} \u00b7 ${number(route.ms, 2)} ms`;
    at("reason").replaceChildren(...(REASONS[route.reason]?.(route) ?? [name(route.expert), ` answers (${route.reason}).`]));
    at("reason").dataset.reason = route.reason;
    this.#drawBars();
    drawFacts(route);
    drawWords(route.words);
    drawCounterfactuals(route);
    drawEvidence(route);
    drawRouter(route);
  }

  #drawBars() {
    const { experts, reason, expert: chosen } = this.#route;
    const costly = experts.some(({ score, expected_quality: quality }) => Math.abs(score - quality) > 1e-6);
    const byQuality = costly && at("measure").querySelector(":checked").value === "quality";
    const of = ({ score, expected_quality: quality }) => (byQuality ? quality : score);
    const routed = reason !== "pinned";
    at("measure").hidden = !(routed && costly);
    at("bars").hidden = at("axis").hidden = !routed;
    if (!routed) return;
    const { low, high, zero } = ends(experts, of);
    const share = (value) => (100 * (value - low)) / (high - low);
    const rows = experts.map((each) => this.#row(each.expert).draw(each, of(each), share, zero, each.expert === chosen || each.selected));
    if (rows.some((row, i) => at("bars").children[i] !== row) || at("bars").childElementCount !== rows.length) {
      at("bars").replaceChildren(...rows);
    }
    at("axisLow").textContent = number(low, 2);
    at("axisName").textContent = `${byQuality ? "expected quality" : "score"} \u00b1 deviation`;
    at("axisHigh").textContent = number(high, 2);
  }

  #row(expert) {
    if (!this.#rows.has(expert)) this.#rows.set(expert, new Row(expert));
    return this.#rows.get(expert);
  }
}

class Row {
  constructor(expert) {
    this.rank = make("span", "rank");
    this.tag = make("span", "tag");
    this.score = make("span", "score");
    this.bar = make("i", "bar");
    this.whisker = make("i", "whisker");
    this.zero = make("i", "zero");
    const track = make("div", "track", this.bar, this.whisker, this.zero);
    track.setAttribute("aria-hidden", "true");
    this.element = make("li", "", this.rank, make("span", "name", expert), this.tag, this.score, track);
  }

  draw({ rank, std, weight, selected, excluded }, value, share, zero, chosen) {
    const from = share(zero);
    this.element.className = chosen ? "chosen" : excluded ? "excluded" : "";
    this.rank.textContent = rank;
    this.tag.textContent = excluded ? EXCLUDED[excluded] ?? excluded : selected && weight < 1 ? `weight ${percent(weight)}` : "";
    this.score.textContent = std ? `${number(value)} \u00b1 ${number(std)}` : number(value);
    place(this.bar, Math.min(from, share(value)), Math.max(from, share(value)));
    place(this.whisker, share(value - std), share(value + std));
    this.whisker.hidden = !std;
    this.zero.style.left = `${from}%`;
    return this.element;
  }
}

// Where the axis begins and ends, and where bars start: at zero, but at the lowest end where all are below it, as
// log-likelihoods are.
function ends(experts, of) {
  const low = Math.min(...experts.map((each) => of(each) - each.std));
  const high = Math.max(...experts.map((each) => of(each) + each.std));
  const pad = 0.04 * (high - low) || 1;
  if (high <= 0) return { low: low - pad, high: Math.min(high + pad, 0) || high + pad, zero: low - pad };
  return { low: low < 0 ? low - pad : 0, high: high + pad, zero: 0 };
}

function place(element, from, to) {
  element.style.left = `${from}%`;
  element.style.width = `${to - from}%`;
}

// Who is ahead of the rest, beside the one that answers.
const runnerUp = (experts) =>
  experts.slice(1).filter(({ excluded }) => !excluded).reduce((best, each) => (each.score > best.score ? each : best)).expert;

function drawFacts({ margin, confidence, entropy, k, reason }) {
  const facts = {
    Margin: [number(margin), "How far the first is ahead of the best other, in score"],
    Confidence: [confidence === null ? "\u2013" : percent(confidence), "The calibrated probability that no other expert would do better"],
    Entropy: [number(entropy, 2), "Of the weights of the experts that answer, in nats: 0 where one answers alone"],
    k: [k, "Experts that answer as one"],
  };
  at("facts").hidden = reason === "pinned";
  at("facts").replaceChildren(...Object.entries(facts).map(([term, [value, meaning]]) => {
    const fact = make("div", "", make("dt", "", term), make("dd", "", value));
    fact.title = meaning;
    return fact;
  }));
}

function drawWords(pulls) {
  const words = pulls.filter(({ score }) => score >= 0.0005);
  const most = Math.max(...words.map(({ score }) => score));
  at("pulled").hidden = !words.length;
  at("words").replaceChildren(...words.map(({ word, score }) => {
    const chip = make("li", "", word, make("span", "", `+${number(score)}`));
    chip.style.setProperty("--pull", `${Math.round(25 + 75 * (score / most))}%`);
    return chip;
  }));
}

function drawCounterfactuals({ counterfactuals = [] }) {
  at("otherwise").hidden = !counterfactuals.length;
  at("counterfactuals").replaceChildren(...counterfactuals.map(({ if: condition, expert }) =>
    make("li", "", condition === "cost_weight = 0" ? "if costs did not count" : condition, make("span", "to", expert))));
}

function drawEvidence({ evidence, text, reason }) {
  at("evidence").hidden = !evidence || reason === "pinned";
  if (!evidence) return;
  at("evidenceKind").textContent = (EVIDENCE[evidence.kind] ?? (() => evidence.kind))(evidence);
  at("near").replaceChildren(...evidence.near.map(near));
  at("routedText").textContent = text;
}

function near({ similarity, ...what }) {
  const shown = make("li", "");
  const heading = "gate" in what ? `gate of ${what.experts.join(", ")}` : "cluster" in what ? `cluster ${what.cluster}` : what.task;
  shown.append(make("span", "task", heading), make("span", "similarity", number(similarity, 2)));
  for (const told of what.representatives ?? (what.prompt ? [what] : [])) shown.append(make("p", "", told.prompt), scores(told.scores));
  return shown;
}

function scores(known) {
  const best = Math.max(...Object.values(known));
  return make("p", "scores", ...Object.entries(known).map(([expert, score]) =>
    make("span", score === best ? "best" : "", `${expert} ${number(score, 2)}`)));
}

function drawRouter({ scorecard: card, router, router_sha256: digest }) {
  at("router").hidden = !digest;
  if (!digest) return;
  at("gain").textContent = card
    ? `On ${card.prompts} prompts it was not fitted on: ${card.gain < 0 ? "" : "+"}${number(card.gain)} over ${card.best_single_expert} for all ` +
      `(95\u202f%: ${number(card.gain_low)} to ${number(card.gain_high)})${card.gain_low > 0 ? "." : ", which may be chance."}`
    : "It has no scorecard: what it gains over one expert for all was not measured.";
  at("digest").textContent = `${router} \u00b7 sha256 ${digest.slice(0, 12)}`;
}
