// Asks the service; what fails becomes one sentence.

export class Failure extends Error {
  constructor(message, { param = null, code = null } = {}) {
    super(message);
    this.param = param;
    this.code = code;
  }
}

// The key that a service may want. asked: what to do once it does.
export const access = { key: "", asked: () => {} };

export async function ask(path, { body, headers = {}, signal } = {}) {
  const bearer = access.key && { authorization: `Bearer ${access.key}` };
  const sent = body && { method: "POST", body: JSON.stringify(body) };
  const response = await reach(path, { ...sent, headers: { ...(sent && { "content-type": "application/json" }), ...bearer, ...headers }, signal });
  if (!response.ok) throw await refusal(response);
  return response;
}

export const json = async (path, options) => (await ask(path, options)).json();

// How every expert is; a service that is not ready says so with a 503, and that is an answer too.
export async function readiness() {
  const response = await reach("readyz", {});
  if (![200, 503].includes(response.status)) throw await refusal(response);
  return response.json();
}

// The events of a stream, up to its end.
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read().catch((error) => {
      throw error.name === "AbortError" ? error : new Failure("The answer broke off.");
    });
    if (done) throw new Failure("The answer broke off.");
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      if (!part.startsWith("data: ")) continue; // a comment, which keeps proxies from hanging up
      const data = part.slice("data: ".length);
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Failure(event.error.message, event.error);
      yield event;
    }
  }
}

async function reach(path, options) {
  try {
    return await fetch(path, options);
  } catch (error) {
    throw error.name === "AbortError" ? error : new Failure("The service does not answer.");
  }
}

async function refusal(response) {
  if (response.status === 401) access.asked();
  try {
    const { error } = await response.json();
    return new Failure(error.message, error);
  } catch {
    return new Failure(`The service answers ${response.status} ${response.statusText}`.trim());
  }
}
