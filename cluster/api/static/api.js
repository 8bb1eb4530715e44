// Calls to this server. Everything that comes back is data: nobody here makes markup of it.

let apiKey = "";

export class ApiError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

export function useKey(key) {
  apiKey = key;
}

function headers(more) {
  return apiKey ? { ...more, authorization: `Bearer ${apiKey}` } : { ...more };
}

async function failure(response) {
  let message = `the server answered ${response.status}`;
  try {
    message = (await response.json()).error.message;
  } catch {
    // Not an answer of ours: the status has to do.
  }
  return new ApiError(message, response.status);
}

export async function getJson(path, { timeoutMs = 5000 } = {}) {
  const response = await fetch(path, {
    headers: headers({}),
    cache: "no-store",
    signal: AbortSignal.timeout(timeoutMs),
  });
  if (!response.ok) throw await failure(response);
  return response.json();
}

// One streamed answer. Calls back for each thing that happens; throws ApiError or AbortError.
//   onProgress({done, total, cached}), onDelta(delta, choice), onUsage(usage, timings)
export async function streamChat(body, { signal, onProgress, onDelta, onUsage }) {
  const response = await fetch("/v1/chat/completions", {
    method: "POST",
    headers: headers({ "content-type": "application/json" }),
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  if (!response.ok) throw await failure(response);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let finished = false;
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) break;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) finished = readLine(line, { onProgress, onDelta, onUsage }) || finished;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
  if (!finished) throw new ApiError("the answer broke off; ask again", 0);
}

// True for the line that ends the stream.
function readLine(line, { onProgress, onDelta, onUsage }) {
  if (line.startsWith(":")) {
    const found = /^: prefill (\d+)\/(\d+) cached (\d+)/.exec(line);
    if (found) onProgress({ done: +found[1], total: +found[2], cached: +found[3] });
    return false;
  }
  if (!line.startsWith("data: ")) return false;
  const data = line.slice(6);
  if (data === "[DONE]") return true;
  const event = JSON.parse(data);
  if (event.error) throw new ApiError(event.error.message, 0);
  for (const choice of event.choices ?? []) onDelta(choice.delta ?? {}, choice);
  if (event.usage) onUsage(event.usage, event.timings ?? {});
  return false;
}
