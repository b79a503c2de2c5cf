// What is sent for a prompt, and the same as code to copy, which takes a key from the environment and never holds it.

import { access } from "./client.js";

const ALTERNATIVES = 5;

export const isRouted = (model) => /^auto(:|$)/.test(model);

// past: turns of the conversation, as { prompt, answer }.
export function compose({ model, chat, system, past, prompt, session, maxTokens, temperature, seed, k, scored }) {
  const said = chat ? { messages: messages(system, past, prompt) } : { prompt };
  const scores = chat ? { logprobs: true, top_logprobs: ALTERNATIVES } : { logprobs: ALTERNATIVES };
  const body = {
    model,
    ...said,
    ...given({ max_tokens: maxTokens, temperature, seed, k: isRouted(model) ? k : null }),
    ...(scored && scores),
    stream: true,
    stream_options: { include_usage: true },
  };
  const headers = chat ? { "x-session-id": session } : {};
  return { path: chat ? "v1/chat/completions" : "v1/completions", body, headers, opens: !past.length };
}

// Who opens a conversation asks without its name, for nobody has answered it yet.
export const written = (as, { opens, headers, ...request }) => WRITERS[as]({ ...request, headers: opens ? {} : headers });

const WRITERS = {
  body: ({ body }) => pretty(body),
  curl: ({ path, body, headers }) =>
    [
      `curl -N ${quoted(address(path))}`,
      ...Object.entries({ "content-type": "application/json", ...headers }).map(([name, value]) => `  -H ${quoted(`${name}: ${value}`)}`),
      ...(access.key ? ['  -H "authorization: Bearer $OPENAI_API_KEY"'] : []),
      `  -d ${quoted(pretty(body))}`,
    ].join(" \\\n"),
  python: ({ path, body, headers }) => {
    const { k, ...fields } = body;
    const extra = { ...(k && { extra_body: { k } }), ...(Object.keys(headers).length && { extra_headers: headers }) };
    const given = Object.entries({ ...fields, ...extra }).map(([name, value]) => `    ${name}=${python(value, "    ")},`);
    const chat = path.includes("chat");
    return [
      ...(access.key ? ["import os", ""] : []),
      "from openai import OpenAI",
      "",
      `client = OpenAI(base_url=${python(address("v1"))}, api_key=${access.key ? 'os.environ["OPENAI_API_KEY"]' : '"none"'})`,
      `stream = client.${chat ? "chat.completions" : "completions"}.create(`,
      ...given,
      ")",
      "for chunk in stream:",
      "    if chunk.choices:",
      `        print(chunk.choices[0].${chat ? "delta.content or \"\"" : "text"}, end="", flush=True)`,
      "",
    ].join("\n");
  },
  javascript: ({ path, body, headers }) =>
    [
      `const response = await fetch(${JSON.stringify(address(path))}, {`,
      '  method: "POST",',
      "  headers: {",
      ...Object.entries({ "content-type": "application/json", ...headers }).map((each) => `    ${each.map((text) => JSON.stringify(text)).join(": ")},`),
      ...(access.key ? ["    authorization: `Bearer ${process.env.OPENAI_API_KEY}`,"] : []),
      "  },",
      `  body: JSON.stringify(${pretty(body).replaceAll("\n", "\n  ")}),`,
      "});",
      "if (!response.ok) throw new Error((await response.json()).error.message);",
      "const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();",
      'let text = "", rest = "";',
      "for (let read = await reader.read(); !read.done; read = await reader.read()) {",
      '  const lines = (rest + read.value).split("\\n");',
      "  rest = lines.pop();",
      '  for (const line of lines.filter((each) => each.startsWith("data: {"))) {',
      '    const { choices, error } = JSON.parse(line.slice("data: ".length));',
      "    if (error) throw new Error(error.message);",
      `    text += choices[0]?.${path.includes("chat") ? "delta.content" : "text"} ?? "";`,
      "  }",
      "}",
      "console.log(text);",
      "",
    ].join("\n"),
};

function messages(system, past, prompt) {
  return [
    ...(system ? [{ role: "system", content: system }] : []),
    ...past.flatMap(({ prompt, answer }) => [{ role: "user", content: prompt }, { role: "assistant", content: answer }]),
    { role: "user", content: prompt },
  ];
}

const given = (fields) => Object.fromEntries(Object.entries(fields).filter(([, value]) => value !== null));

const address = (path) => new URL(path, document.baseURI).href;

const pretty = (value) => JSON.stringify(value, null, 2);

const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

// A literal of Python's; of strings, JSON's are the same.
function python(value, indent = "") {
  const inner = `${indent}    `;
  const block = (open, lines, close) => (lines.length ? `${open}\n${lines.map((line) => `${inner}${line},\n`).join("")}${indent}${close}` : open + close);
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (Array.isArray(value)) return block("[", value.map((each) => python(each, inner)), "]");
  if (typeof value !== "object") return JSON.stringify(value);
  const pairs = Object.entries(value).map(([name, each]) => `${JSON.stringify(name)}: ${python(each)}`);
  return pairs.join(", ").length < 60 ? `{${pairs.join(", ")}}` : block("{", pairs, "}");
}
