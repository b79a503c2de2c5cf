// One page: sends a prompt, shows the route that it takes, and the answer as it streams.

const at = (id) => document.getElementById(id);
const REASONS = {
  no_evidence: () => "The prompt says nothing about the experts, so the default answers.",
  fixed: () => "This bundle sends every prompt to one expert.",
  pinned: ({ expert }) => `You chose ${expert}.`,
  only_choice: ({ expert }) => `No other expert could answer this than ${expert}.`,
  abstained: ({ confidence, experts }) =>
    `The router is not sure enough of ${experts[1].expert} (${Math.round(100 * confidence)} %), so the default answers.`,
  top_score: ({ margin, experts }) =>
    experts.length > 1 ? `Highest score, ${margin.toFixed(3)} ahead of ${experts[1].expert}.` : "The only expert.",
};

let running = null; // the AbortController of the answer that is under way

function body() {
  const prompt = at("prompt").value;
  const what = at("format").value === "chat" ? { messages: [{ role: "user", content: prompt }] } : { prompt };
  const sampling = { max_tokens: at("tokens").valueAsNumber, temperature: at("temperature").valueAsNumber };
  return { model: at("model").value, ...what, ...sampling, stream: true, stream_options: { include_usage: true } };
}

async function post(path, body, signal) {
  const headers = { "content-type": "application/json" };
  const response = await fetch(path, { method: "POST", headers, body: JSON.stringify(body), signal });
  if (!response.ok) throw new Error((await response.json()).error.message);
  return response;
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("The answer broke off.");
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.slice("data: ".length);
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

function element(name, className, text = "") {
  const made = document.createElement(name);
  made.className = className;
  made.textContent = text;
  return made;
}

function bars({ experts, expert: chosen }) {
  const scores = experts.map(({ score }) => score);
  const low = Math.min(0, ...scores);
  const span = Math.max(0, ...scores) - low || 1;
  const percent = (score) => (100 * (score - low)) / span;
  return experts.map(({ expert, score }) => {
    const bar = element("i", "");
    bar.style.left = `${percent(Math.min(score, 0))}%`;
    bar.style.width = `${percent(Math.max(score, 0)) - percent(Math.min(score, 0))}%`;
    const zero = element("b", "");
    zero.style.left = `${percent(0)}%`;
    const track = element("div", "track");
    track.append(bar, ...(low < 0 ? [zero] : []));
    const row = element("li", expert === chosen ? "chosen" : "");
    row.append(element("span", "name", expert), element("span", "score", score.toFixed(3)), track);
    return row;
  });
}

function showRoute(route) {
  at("reason").textContent = REASONS[route.reason](route);
  at("bars").replaceChildren(...(route.reason === "pinned" ? [] : bars(route)));
  at("words").replaceChildren(...route.words.map(({ word, score }) => {
    const chip = element("li", "", `${word} `);
    chip.append(element("span", "", `+${score.toFixed(3)}`));
    return chip;
  }));
  at("pulled").hidden = route.words.length === 0;
  at("timing").textContent = `decided in ${route.ms.toFixed(2)} ms`;
}

async function showAnswer(response, sent) {
  let first = null;
  for await (const event of events(response)) {
    const now = performance.now();
    const choice = event.choices[0];
    if (choice) {
      first ??= now;
      at("expert").textContent = event.model;
      at("expert").hidden = false;
      at("answer").append(choice.text ?? choice.delta.content ?? "");
    } else {
      const { completion_tokens: tokens } = event.usage;
      const rate = tokens > 1 && now > first ? ` · ${((1000 * (tokens - 1)) / (now - first)).toFixed(1)} tokens/s` : "";
      at("stats").textContent = `${tokens} tokens${rate} · first after ${Math.round(first - sent)} ms`;
    }
  }
}

function clear() {
  for (const id of ["answer", "stats", "reason", "timing", "error"]) at(id).textContent = "";
  for (const id of ["bars", "words"]) at(id).replaceChildren();
  for (const id of ["error", "pulled", "expert"]) at(id).hidden = true;
}

async function send() {
  const asked = body();
  running = new AbortController();
  clear();
  at("send").textContent = "Stop";
  at("answer").setAttribute("aria-busy", "true");
  try {
    const sent = performance.now();
    const answering = post(asked.messages ? "/v1/chat/completions" : "/v1/completions", asked, running.signal);
    answering.catch(() => {}); // awaited below, unless the route already says what is wrong
    showRoute(await (await post("/route", asked, running.signal)).json());
    at("result").hidden = false;
    await showAnswer(await answering, sent);
  } catch (error) {
    if (error.name !== "AbortError") {
      at("error").textContent = error.message;
      at("error").hidden = false;
    }
    at("result").hidden ||= !at("answer").textContent;
  } finally {
    running = null;
    at("send").textContent = "Send";
    at("answer").removeAttribute("aria-busy");
  }
}

async function listModels() {
  const { data } = await (await fetch("/v1/models")).json();
  at("model").replaceChildren(...data.map(({ id }) => new Option(id)));
}

async function watchHealth() {
  let ready = false;
  try {
    const { experts, ...rest } = await (await fetch("/readyz")).json();
    const having = (state) => Object.keys(experts).filter((name) => experts[name].state === state);
    const parts = ["loading", "failed"].filter((state) => having(state).length).map((state) => `${state}: ${having(state).join(", ")}`);
    const count = having("ready").length;
    at("health").textContent = [`${count} expert${count === 1 ? "" : "s"} ready`, ...parts].join(" · ");
    at("health").dataset.state = having("failed").length ? "failed" : rest.ready ? "ready" : "loading";
    ready = rest.ready;
  } catch {
    at("health").textContent = "the service does not answer";
    at("health").dataset.state = "failed";
  }
  setTimeout(watchHealth, ready ? 15000 : 1500);
}

at("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) running.abort();
  else send();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !running) at("composer").requestSubmit();
  if (event.key === "Escape") running?.abort();
});
at("examples").addEventListener("click", (event) => {
  if (!event.target.dataset.prompt) return;
  at("prompt").value = event.target.dataset.prompt;
  at("prompt").focus();
});

listModels().catch(() => {}); // watchHealth says that nobody answers
watchHealth();
