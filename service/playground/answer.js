// One answer: streams itself into the page, with its numbers, its failure, and the probabilities of its tokens.

import { ask, events } from "./client.js";
import { at, button, copy, make, number, percent } from "./dom.js";

const REASONS = {
  top_score: "highest score", no_evidence: "default: no evidence", abstained: "default: the router is not sure", only_choice: "only choice",
  fixed: "fixed", pinned: "chosen by you", retained: "stays with the conversation", switched: "switched", fallback: "fallback",
};

export class Answer {
  text = "";
  route = null; // as the service took it
  failure = null;
  #tokens = []; // of the answer, where their probabilities were asked for
  #bytes = new TextDecoder();
  #sent = 0;
  #first = null;

  constructor(retry) {
    this.#retry = retry;
    this.badge = make("span", "badge");
    this.why = make("span", "why");
    this.copy = button("plain", "Copy", ({ target }) => copy(this.text, target));
    this.copy.hidden = true;
    this.words = make("div", "text");
    this.words.addEventListener("keydown", walk);
    this.stats = make("p", "stats");
    this.legend = make("p", "legend", "probable", make("i", ""), "improbable");
    this.legend.hidden = true;
    this.error = make("div", "error");
    this.error.setAttribute("role", "alert");
    this.element = make("article", "answer", make("header", "", this.badge, this.why, this.copy), this.words, this.error, this.stats, this.legend);
  }

  #retry;

  // Resolves when the answer has ended, whatever ended it.
  async stream({ path, body, headers }, signal, grown) {
    this.#sent = performance.now();
    this.badge.textContent = body.model;
    this.badge.classList.add("pending");
    this.words.setAttribute("aria-busy", "true");
    let usage = null, finish = "stopped", last = 0;
    try {
      const response = await ask(path, { body, headers: { ...headers, "x-route-debug": "1" }, signal });
      this.#named(response.headers.get("x-route-expert"), response.headers.get("x-route-reason"));
      for await (const event of events(response)) {
        const [choice] = event.choices;
        if (choice) {
          last = performance.now();
          this.#first ??= last;
          finish = choice.finish_reason ?? finish;
          this.#grow(choice);
          grown(this);
        }
        usage = event.usage ?? usage;
        this.route = event.route ?? this.route;
      }
    } catch (error) {
      finish = error.name === "AbortError" ? "stopped" : "failed";
      if (finish === "failed") this.#fail(error);
    }
    this.#end(usage, finish, last);
    grown(this);
  }

  // Shows the probabilities, or the text alone.
  draw(scored) {
    this.scored = scored;
    this.legend.hidden = !(scored && this.#tokens.length);
    if (scored && this.#tokens.length) this.words.replaceChildren(...this.#tokens.map((token) => token.element));
    else this.words.replaceChildren(this.text);
    roving(this.words);
  }

  #named(expert, reason) {
    this.badge.textContent = expert;
    this.badge.classList.remove("pending");
    this.why.textContent = REASONS[reason] ?? reason;
    this.why.dataset.reason = reason;
  }

  #grow({ text, delta, logprobs }) {
    const grown = text ?? delta.content ?? "";
    const tokens = (logprobs ? scored(logprobs) : []).map((token) => spelled(token, this.#bytes));
    this.text += grown;
    this.#tokens.push(...tokens);
    if (this.scored && this.#tokens.length) this.words.append(...tokens.map(({ element }) => element));
    else this.words.append(grown);
  }

  #fail(error) {
    this.failure = error;
    this.error.append(make("p", "", error.message));
    const about = [error.code, error.param && `field ${error.param}`].filter(Boolean).join(" \u00b7 ");
    const foot = make("p", "about", about, button("plain", "Try again", this.#retry));
    this.error.append(foot);
  }

  #end(usage, finish, last) {
    this.words.removeAttribute("aria-busy");
    this.copy.hidden = !this.text;
    this.words.hidden = this.failure && !this.text;
    const answering = this.route?.experts?.filter(({ selected }) => selected) ?? [];
    if (answering.length > 1) this.badge.textContent = answering.map(({ expert, weight }) => `${expert} ${percent(weight)}`).join(" + ");
    this.draw(this.scored);
    const count = usage?.completion_tokens;
    const rate = count > 1 && last > this.#first ? (1000 * (count - 1)) / (last - this.#first) : null;
    const stats = {
      tokens: count,
      "tokens/s": rate && number(rate, 1),
      "first piece": this.#first && `${Math.round(this.#first - this.#sent)} ms`,
      total: this.#first && `${number((last - this.#sent) / 1000, 2)} s`,
      prompt: usage?.prompt_tokens,
      cached: usage?.prompt_tokens_details?.cached_tokens || null,
      finish,
    };
    this.stats.hidden = this.words.hidden;
    const shown = Object.entries(stats).filter(([, value]) => value !== null && value !== undefined);
    this.stats.replaceChildren(...shown.map(([name, value]) => make("span", "", `${name} `, make("b", "", value))));
  }
}

// The tokens of a piece in one shape: { bytes, logprob, top: [{ text, logprob }] }.
function scored({ content, tokens, token_logprobs: logprobs, top_logprobs: tops }) {
  if (content) {
    return content.map(({ token, bytes, logprob, top_logprobs: top }) => ({
      bytes: Uint8Array.from(bytes ?? new TextEncoder().encode(token)), logprob, top: top.map(({ token, logprob }) => ({ text: token, logprob })),
    }));
  }
  return tokens.map((token, i) => ({
    bytes: written(token), logprob: logprobs[i], top: Object.entries(tops[i] ?? {}).map(([text, logprob]) => ({ text, logprob })),
  }));
}

// The bytes of a token of OpenAI's completions, which write those that are no text by number.
function written(token) {
  return /^bytes:(\\x[0-9a-f]{2})+$/.test(token)
    ? Uint8Array.from(token.match(/[0-9a-f]{2}(?=\\|$)/g), (byte) => parseInt(byte, 16))
    : new TextEncoder().encode(token);
}

// A token with its element; the bytes of a character that is not whole yet are shown with the token that ends it.
function spelled(token, decoder) {
  const element = make("span", "token", decoder.decode(token.bytes, { stream: true }));
  const probability = Math.exp(token.logprob);
  element.style.setProperty("--doubt", `${Math.round(100 * (1 - probability))}%`);
  element.tabIndex = -1;
  element.setAttribute("aria-describedby", "alternatives");
  for (const event of ["mouseenter", "focus"]) element.addEventListener(event, () => explain(element, token));
  for (const event of ["mouseleave", "blur"]) element.addEventListener(event, () => (at("alternatives").hidden = true));
  return { ...token, element };
}

function explain(element, { bytes, logprob, top }) {
  const own = new TextDecoder().decode(bytes);
  const others = top.filter(({ text }) => text !== own);
  const rows = [{ text: own, logprob, own: true }, ...others].sort((a, b) => b.logprob - a.logprob);
  const tip = at("alternatives");
  tip.replaceChildren(...rows.map(({ text, logprob, own }) => {
    const bar = make("i", "");
    bar.style.width = `${100 * Math.exp(logprob)}%`;
    return make("li", own ? "own" : "", make("code", "", visible(text)), make("span", "", `${number(100 * Math.exp(logprob), 1)}\u202f%`), make("div", "track", bar));
  }));
  tip.hidden = false;
  const { left, bottom, top: above } = element.getClientRects()[0] ?? element.getBoundingClientRect();
  const below = bottom + tip.offsetHeight + 8 < innerHeight;
  tip.style.left = `${Math.max(8, Math.min(left, innerWidth - tip.offsetWidth - 8))}px`;
  tip.style.top = `${below ? bottom + 6 : above - tip.offsetHeight - 6}px`;
}

const visible = (text) => text.replaceAll(" ", "\u00b7").replaceAll("\n", "\u21b5").replaceAll("\t", "\u21e5") || "\u2205";

// One stop of the Tab key for all tokens; the arrow keys go from one to the next.
function roving(words) {
  const first = words.querySelector(".token");
  if (first) first.tabIndex = 0;
}

function walk(event) {
  const step = { ArrowRight: "nextElementSibling", ArrowLeft: "previousElementSibling" }[event.key];
  const next = step && event.target[step];
  if (!next) return;
  event.preventDefault();
  event.target.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
}
