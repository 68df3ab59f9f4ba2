// The server's API: one model, streamed completions. The key, if one is needed, lives as long as this tab.

const KEY = "outrider-api-key";

export class ApiError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
};

/** The served model's entry of /v1/models. Throws ApiError. */
export async function servedModel() {
  const answer = await call("/v1/models", {});
  return (await answer.json()).data[0];
}

/** The chunks of a streamed completion. Throws ApiError, also for an error within the stream, and AbortError. */
export async function* completion(body, signal) {
  const answer = await call("/v1/completions", {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ ...body, stream: true }),
    signal,
  });
  for await (const data of events(answer.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(chunk.error.message, 0);
    yield chunk;
  }
  throw new ApiError("the connection ended before the answer did; run it again", 0);
}

async function call(path, options) {
  const headers = { ...options.headers };
  if (key.get()) headers.authorization = `Bearer ${key.get()}`;
  let answer;
  try {
    answer = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("the server cannot be reached; see whether it runs", 0);
  }
  if (!answer.ok) throw new ApiError(await problem(answer), answer.status);
  return answer;
}

function broken(error) {
  if (error.name === "AbortError") throw error;
  throw new ApiError("the connection to the server broke; run it again", 0);
}

async function problem(answer) {
  try {
    return (await answer.json()).error.message;
  } catch {
    return `the server answered ${answer.status} ${answer.statusText}`;
  }
}

/** The data of server-sent events; the server writes each as one line, comments keep the connection alive. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read().catch(broken);
      if (done) return;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) if (line.startsWith("data: ")) yield line.slice(6).trimEnd();
    }
  } finally {
    reader.cancel().catch(() => {}); // an aborted one is cancelled already
  }
}
