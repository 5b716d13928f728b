// The server's routes: JSON in and out, answers as server-sent events, and errors as words of the dictionary.

let key = sessionStorage.getItem("jaxlm.key") || "";
export function setKey(value) {
  key = value;
  sessionStorage.setItem("jaxlm.key", value);
}

// What went wrong: a key of the dictionary and what stands in its text.
export class Refused extends Error {
  constructor(word, values = {}) {
    super(word);
    Object.assign(this, { word, values });
  }
}

export async function call(path, body, signal) {
  const headers = { ...(key && { Authorization: `Bearer ${key}` }), ...(body && { "Content-Type": "application/json" }) };
  let response;
  try {
    response = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal });
  } catch (error) {
    throw error.name === "AbortError" ? error : new Refused("e_away");
  }
  if (response.ok) return response;
  const message = await response.json().then((content) => content.error?.message ?? "", () => "");
  const seconds = response.headers.get("Retry-After") ?? "1";
  const words = { 401: "e_key", 413: "e_long", 429: "e_queue", 501: "e_cannot", 503: "e_ready" };
  const word = words[response.status] ?? (response.status < 500 ? "e_refused" : "e_server");
  throw new Refused(word, { message: message || String(response.status), seconds });
}
export const read = async (path, body, signal) => (await call(path, body, signal)).json();

// State of the server: {word, done, all} until it answers, null once it does.
export async function health() {
  try {
    const response = await fetch("health"), state = await response.json().catch(() => ({}));
    if (response.ok) return null;
    if (state.status === "failed") return { word: "e_failed" };
    return { word: "e_ready", done: state.programs_compiled ?? 0, all: state.programs ?? 0 };
  } catch {
    return { word: "e_away" };
  }
}

const pairs = (top) => (Array.isArray(top) ? top.map((entry) => [entry.token, entry.logprob]) : Object.entries(top ?? {}));

// Tokens of either route in one shape: [token, log-probability, [[other, log-probability], …]].
function tokensOf(logprobs) {
  if (logprobs?.content) return logprobs.content.map((entry) => [entry.token, entry.logprob, pairs(entry.top_logprobs)]);
  return (logprobs?.tokens ?? []).map((token, at) => [token, logprobs.token_logprobs[at], pairs(logprobs.top_logprobs?.[at])]);
}

// Answers a request piece by piece: yields {text, tokens, finish, usage}.
export async function* stream(path, body, signal) {
  const response = await call(path, { ...body, stream: true, stream_options: { include_usage: true } }, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "", ended = false;
  try {
    while (!ended) {
      const { done, value } = await reader.read();
      if (done) break;
      const lines = (rest + value).split(/\r?\n/);
      rest = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data:")) continue;
        const content = line.slice(5).trim();
        if (content === "[DONE]") { ended = true; break; }
        const event = JSON.parse(content);
        if (event.error) throw new Refused("e_server", { message: event.error.message });
        const choice = event.choices?.[0];
        const text = choice?.delta?.content ?? choice?.text ?? "";
        yield { text, tokens: tokensOf(choice?.logprobs), finish: choice?.finish_reason ?? null, usage: event.usage ?? null };
      }
    }
  } catch (error) {
    throw error.name === "AbortError" || error instanceof Refused ? error : new Refused("e_broken");
  }
  if (!ended) throw new Refused("e_broken");
}
