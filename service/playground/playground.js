// The page: what is typed becomes a route as it is typed, and a streamed answer when it is sent.

import { Answer } from "./answer.js";
import { access, json, readiness } from "./client.js";
import { at, copy, make } from "./dom.js";
import { compose, isRouted, written } from "./request.js";
import { RouteCard } from "./route.js";

const PAUSE = 120; // milliseconds without a key before the route is asked for
const FIELDS = { temperature: "temperature", max_tokens: "maxTokens", seed: "seed", k: "k", model: "model" };
const THEMES = ["system", "light", "dark"];
const MAC = /Mac|iP(hone|ad)/.test(navigator.userAgent);
const POLL = { waiting: 1000, ready: 15000 };

const card = new RouteCard();
let session = name();
let turns = []; // of the conversation, as { prompt, chat, answers, element }
let running = null; // the AbortController of the answers that are under way
let asking = null; // and of the route
let pause = null;
let seen = null; // the experts' states that are shown
let lookAgain = () => {};
let sent = null; // the requests that were sent last
let routed = null; // the request whose route is shown
const taken = new WeakMap(); // the routes of answered requests

function name() {
  return Array.from(crypto.getRandomValues(new Uint8Array(8)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

// Requests

const models = () => (at("compare").checked ? [at("model").value, at("other").value] : [at("model").value]);

const amount = (id) => (at(id).value === "" ? null : at(id).valueAsNumber);

function requests(prompt) {
  return models().map((model, lane) =>
    compose({
      model,
      prompt,
      chat: at("chat").checked,
      system: at("system").value.trim(),
      past: past(lane),
      session: `${session}-${lane}`, // a lane's own: the service remembers who answered a session
      maxTokens: amount("maxTokens"),
      temperature: amount("temperature"),
      seed: amount("seed"),
      k: amount("k"),
      scored: at("scored").checked,
    }));
}

// What a lane has answered so far; where it has not, what the first one did.
function past(lane) {
  const said = turns.filter(({ chat }) => chat).map(({ prompt, answers }) => ({ prompt, answer: (answers[lane] ?? answers[0]).text }));
  return said.filter(({ answer }) => answer);
}

// What would be sent; with nothing typed, what was.
const shownRequests = () => (at("prompt").value.trim() || !sent ? requests(at("prompt").value) : sent);

function showCode() {
  const tab = at("tabs").querySelector("[aria-selected=true]");
  at("code").textContent = written(tab.id.slice("tab-".length), shownRequests()[0]);
}

// The route as one types

function changed() {
  for (const field of document.querySelectorAll("[aria-invalid]")) field.removeAttribute("aria-invalid");
  at("told").textContent = told();
  at("k").disabled = !models().some(isRouted);
  at("systemField").hidden = !at("chat").checked;
  showCode();
  clearTimeout(pause);
  pause = setTimeout(showRoute, PAUSE);
}

async function showRoute() {
  clearTimeout(pause);
  asking?.abort();
  if (!at("prompt").value.trim() && !sent) return;
  const shown = shownRequests();
  const request = shown.find(({ body }) => isRouted(body.model)) ?? shown[0];
  if (request === routed) return card.rest(); // asked anew it may be another: the service remembers who answered
  const { signal } = (asking = new AbortController());
  card.wait();
  try {
    const route = await json("route?detail=full", { body: request.body, headers: request.headers, signal });
    routed = request;
    card.show({ ...route, ...taken.get(request) });
  } catch (error) {
    if (error.name === "AbortError") return;
    routed = null;
    card.fail(error.message);
    blame(error);
  }
}

function blame({ param }) {
  at(FIELDS[param])?.setAttribute("aria-invalid", "true");
}

function told() {
  const values = [
    `temperature ${at("temperature").value || "1"}`,
    at("maxTokens").value && `${at("maxTokens").value} tokens`,
    at("seed").value && `seed ${at("seed").value}`,
    at("k").value && `k ${at("k").value}`,
    at("chat").checked && at("system").value.trim() && "system message",
  ];
  return values.filter(Boolean).join(" \u00b7 ");
}

// Answers

async function send(prompt) {
  const asked = (sent = requests(prompt));
  const turn = { prompt, chat: at("chat").checked, answers: [] };
  turn.answers = asked.map(() => new Answer(() => again(turn)));
  turn.element = make("section", "turn", make("p", "asked", prompt), make("div", "answers", ...turn.answers.map(({ element }) => element)));
  turn.element.dataset.lanes = asked.length;
  const mine = (running = new AbortController());
  at("welcome").hidden = true;
  at("thread").append(turn.element);
  at("prompt").value = "";
  label();
  turn.element.scrollIntoView({ block: "end" });
  showRoute();
  showCode();
  for (const answer of turn.answers) answer.draw(at("scored").checked);
  await Promise.all(turn.answers.map((answer, lane) => answer.stream(asked[lane], mine.signal, follow)));
  if (running === mine) running = null;
  if (turn.element.isConnected) turns.push(turn);
  label();
  changed();
  tookRoutes(asked, turn.answers);
  for (const { failure } of turn.answers) if (failure) blame(failure);
}

// The route that was taken can be another than the one foreseen: an expert may have failed on the way.
function tookRoutes(requests, answers) {
  answers.forEach(({ route }, lane) => {
    if (route) taken.set(requests[lane], route);
    if (route && requests[lane] === routed) card.add(route);
  });
}

function again(turn) {
  if (running) return;
  turns = turns.filter((each) => each !== turn);
  turn.element.remove();
  send(turn.prompt);
}

// Keeps the end of an answer in sight for as long as the reader does.
function follow({ element }) {
  const box = at("thread");
  const scrolls = getComputedStyle(box).overflowY !== "visible";
  const edge = scrolls ? box.getBoundingClientRect().bottom : innerHeight;
  const beyond = element.getBoundingClientRect().bottom - edge;
  if (beyond > 0 && beyond < 120) (scrolls ? box : window).scrollBy(0, beyond + 16);
}

function label() {
  at("send").textContent = running ? "Stop" : "Send";
  at("send").classList.toggle("stop", Boolean(running));
  at("sendKey").textContent = running ? "Esc" : `${MAC ? "Cmd" : "Ctrl"} Enter`;
}

function newChat() {
  running?.abort();
  asking?.abort();
  for (const element of at("thread").querySelectorAll(".turn")) element.remove();
  turns = [];
  sent = routed = null;
  session = name();
  at("welcome").hidden = false;
  card.clear();
  changed();
  at("prompt").focus();
}

// The service: its experts, and how they are

async function listModels() {
  const { data } = await json("v1/models");
  const names = data.map(({ id }) => id);
  const experts = data.filter(({ id }) => !isRouted(id));
  for (const [select, otherwise] of [[at("model"), "auto"], [at("other"), experts[0]?.id]]) {
    const chosen = names.includes(select.value) && select.options.length > 1 ? select.value : otherwise;
    const group = (label, ids) => {
      const made = document.createElement("optgroup");
      made.label = label;
      made.append(...ids.map((id) => new Option(id)));
      return made;
    };
    select.replaceChildren(group("Routed", names.filter(isRouted)), group("Experts", experts.map(({ id }) => id)));
    select.value = chosen;
  }
  at("k").max = experts.length;
  return experts;
}

async function watch() {
  for (;;) {
    const wait = (await look()) ? POLL.ready : POLL.waiting;
    await new Promise((wake) => {
      lookAgain = wake;
      setTimeout(wake, wait);
    });
  }
}

// Shows how the experts are, if that is news; returns whether they are all that they will be.
async function look() {
  try {
    const { ready, experts } = await readiness();
    const news = JSON.stringify(experts);
    if (news !== seen) {
      const having = (state) => Object.values(experts).filter((each) => each.state === state).length;
      const parts = ["ready", "loading", "failed"].filter(having).map((state) => `${having(state)} ${state}`);
      health(having("failed") ? "failed" : ready ? "ready" : "loading", `experts: ${parts.join(", ")}`);
      showExperts(experts, await listModels());
      changed();
    }
    seen = news;
    return ready && !Object.values(experts).some(({ state }) => state === "loading");
  } catch (error) {
    health("failed", error.code === "invalid_api_key" ? "an API key is needed" : error.message);
    seen = null;
    return false;
  }
}

function health(state, said) {
  at("health").dataset.state = state;
  if (at("health").textContent !== said) at("health").textContent = said;
}

function showExperts(states, listed) {
  at("experts").classList.toggle("first", Object.values(states).some(({ state }) => state !== "ready"));
  at("readiness").replaceChildren(...Object.entries(states).map(([expert, { state, detail = "" }]) => {
    const { window: tokens, facts } = listed.find(({ id }) => id === expert) ?? {};
    const known = [tokens && `window ${tokens}`, ...Object.entries(facts ?? {}).filter(([, value]) => typeof value !== "object").map(([fact, value]) => `${fact} ${value}`)];
    const row = make("li", "", make("span", "name", expert), make("span", "state", state), make("p", "", detail || known.filter(Boolean).join(" \u00b7 ")));
    row.dataset.state = state;
    const share = /^(\d+)\s*%/.exec(detail);
    if (state === "loading") row.append(progress(expert, share && Number(share[1])));
    return row;
  }));
}

function progress(expert, share) {
  const made = document.createElement("progress");
  made.max = 100;
  if (share !== null) made.value = share;
  made.setAttribute("aria-label", `loading ${expert}`);
  return made;
}

async function showRelease() {
  const { version, bundle } = await json("version").catch(() => ({})); // watch says what is wrong
  at("release").textContent = version ? `${bundle} \u00b7 ${version}` : "";
}

// What is remembered: the theme, and for as long as the tab lives the key

function remembered(storage, name) {
  try {
    return window[storage].getItem(name) ?? "";
  } catch {
    return ""; // storage is switched off
  }
}

function remember(storage, name, value) {
  try {
    window[storage].setItem(name, value);
  } catch {
    // for this visit, then
  }
}

access.key = remembered("sessionStorage", "key");
access.asked = () => (at("access").hidden = false);

at("access").addEventListener("submit", (event) => {
  event.preventDefault();
  access.key = at("key").value.trim();
  remember("sessionStorage", "key", access.key);
  at("access").hidden = true;
  showCode();
  showRelease();
  lookAgain();
});

function wear(chosen) {
  remember("localStorage", "theme", chosen);
  document.documentElement.dataset.theme = chosen;
  at("theme").textContent = `Theme: ${chosen}`;
}

// Hands and keys

const toggle = (id) => at(id).click();

const KEYS = {
  "/": () => at("prompt").focus(),
  "?": () => at("keys").showModal(),
  n: newChat,
  m: () => at("model").focus(),
  f: () => toggle(at("chat").checked ? "completion" : "chat"),
  c: () => toggle("compare"),
  p: () => toggle("scored"),
  s: () => (at("settings").open = !at("settings").open),
  t: () => toggle("theme"),
};

const typing = (target) => target.matches("textarea, select, input:not([type=checkbox], [type=radio])");

document.addEventListener("keydown", (event) => {
  const { key, target, ctrlKey, metaKey, altKey } = event;
  if (at("keys").open) return;
  if (key === "Enter" && (ctrlKey || metaKey)) {
    event.preventDefault();
    if (!running) at("composer").requestSubmit();
  } else if (key === "Escape") {
    at("alternatives").hidden = true;
    if (running) running.abort();
    else if (typing(target)) at("thread").focus();
  } else if (!(ctrlKey || metaKey || altKey) && !typing(target) && KEYS[key.toLowerCase()]) {
    event.preventDefault();
    KEYS[key.toLowerCase()]();
  }
});

at("prompt").addEventListener("keydown", (event) => {
  if (event.key !== "ArrowUp" || at("prompt").value || !turns.length) return;
  event.preventDefault();
  at("prompt").value = turns.at(-1).prompt;
  changed();
});

at("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!running && at("prompt").value.trim()) send(at("prompt").value);
});

at("send").addEventListener("click", (event) => {
  if (!running) return;
  event.preventDefault(); // to stop, nothing need be filled in
  running.abort();
});

at("composer").addEventListener("invalid", () => (at("settings").open = true), true);

at("composer").addEventListener("input", (event) => {
  at("otherField").hidden = !at("compare").checked;
  if (event.target === at("scored")) {
    for (const { answers } of turns) for (const answer of answers) answer.draw(at("scored").checked);
  }
  changed();
});

at("examples").addEventListener("click", ({ target }) => {
  if (!target.dataset.prompt) return;
  at("prompt").value = target.dataset.prompt;
  at("prompt").focus();
  changed();
});

at("tabs").addEventListener("click", ({ target }) => choose(target.closest("[role=tab]")));
at("tabs").addEventListener("keydown", ({ key, target }) => {
  const all = [...at("tabs").children];
  const to = { ArrowRight: all.indexOf(target) + 1, ArrowLeft: all.indexOf(target) - 1, Home: 0, End: -1 }[key];
  if (to !== undefined) choose(all.at(to % all.length));
});

function choose(tab) {
  if (!tab) return;
  for (const each of at("tabs").children) {
    each.setAttribute("aria-selected", each === tab);
    each.tabIndex = each === tab ? 0 : -1;
  }
  tab.focus();
  at("code").setAttribute("aria-labelledby", tab.id);
  showCode();
}

at("copyCode").addEventListener("click", ({ target }) => copy(at("code").textContent, target));
at("newChat").addEventListener("click", newChat);
at("theme").addEventListener("click", () => wear(THEMES[(THEMES.indexOf(document.documentElement.dataset.theme) + 1) % THEMES.length]));
at("help").addEventListener("click", () => at("keys").showModal());
at("closeKeys").addEventListener("click", () => at("keys").close());

wear(THEMES.includes(remembered("localStorage", "theme")) ? remembered("localStorage", "theme") : "system");
label();
showRelease();
changed();
watch();
