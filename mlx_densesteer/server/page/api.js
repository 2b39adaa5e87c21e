/** Requests to the server: its overview, and streamed answers. */

const KEY = "densesteer.key"; // kept in this tab only

export class Refused extends Error {
  /** @param {string} message @param {number} status 0 without a response */
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

export function useKey(key) {
  sessionStorage.setItem(KEY, key);
}

export function hasKey() {
  return sessionStorage.getItem(KEY) !== null;
}

function headers() {
  return hasKey() ? { Authorization: `Bearer ${sessionStorage.getItem(KEY)}` } : {};
}

async function ask(path, options = {}) {
  let response;
  try {
    response = await fetch(path, { ...options, headers: { ...headers(), ...options.headers } });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused("The server cannot be reached. Is it still running?", 0);
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => ({}));
  throw new Refused(body.error?.message ?? `The server answered ${response.status}.`, response.status);
}

/** @returns {Promise<{id: string, loaded: boolean}[]>} the models, without their presets */
export async function models() {
  return (await (await ask("/v1/models")).json()).data.filter((one) => !one.id.includes("@"));
}

/** @param {string | null} model null: the server has one @returns {Promise<object>} its vectors and presets: /v1/steering */
export async function overview(model) {
  return (await ask(`/v1/steering${model ? `?model=${encodeURIComponent(model)}` : ""}`)).json();
}

/**
 * Stream one answer.
 * @param {object} request the body of /v1/chat/completions
 * @param {AbortSignal} signal
 * @returns {AsyncGenerator<{text?: string, thought?: string, steering?: object, usage?: object, reason?: string, starts?: number[], stated?: string | null,
 *   brakes?: {dropped: number, strength_before: number, strength_after: number}[]}>}
 */
export async function* answer(request, signal) {
  const body = JSON.stringify({ ...request, stream: true, stream_options: { include_usage: true } });
  const response = await ask("/v1/chat/completions", {
    method: "POST", body, signal, headers: { "Content-Type": "application/json" },
  });
  let done = false;
  for await (const data of events(response.body)) {
    done ||= data === "[DONE]"; // read on to the end, so that the connection can be used again
    if (done) continue;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Refused(chunk.error.message, 500);
    const choice = chunk.choices[0];
    yield {
      text: choice?.delta?.content || undefined,
      thought: choice?.delta?.reasoning_content || undefined,
      reason: choice?.finish_reason || undefined,
      steering: "steering" in chunk ? chunk.steering : undefined,
      usage: chunk.usage,
      starts: choice?.step_starts,
      stated: choice?.stated_answer,
      brakes: choice?.brakes,
    };
  }
  if (!done) throw brokenOff();
}

/** Yield the data of server-sent events, without comments. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await read(reader);
      if (done) return;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) if (line.startsWith("data: ")) yield line.slice(6);
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

async function read(reader) {
  try {
    return await reader.read();
  } catch (error) {
    throw error.name === "AbortError" ? error : brokenOff();
  }
}

function brokenOff() {
  return new Refused("The answer broke off before its end. Is the server still running?", 0);
}
