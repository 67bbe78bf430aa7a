// The server's own API: an answer as a stream of chunks, as any OpenAI client gets it.

export class ApiError extends Error {}

async function errorOf(response) {
  try {
    const { error } = await response.json();
    return new ApiError(error.message);
  } catch {
    return new ApiError(`the server answered with status ${response.status}`);
  }
}

export async function modelName() {
  const response = await fetch("v1/models");
  if (!response.ok) throw await errorOf(response);
  const { data } = await response.json();
  return data[0].id;
}

/** Yields the chunks of an answer. Aborting `signal` ends it, and frees the request in the engine. */
export async function* chunks(body, signal) {
  const response = await fetch("v1/chat/completions", {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  if (!response.ok) throw await errorOf(response);
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(chunk.error.message);
    yield chunk;
  }
}

/** The data of the server-sent events in a stream of bytes; comments are left out. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const parts = (rest + value).split(/\r?\n\r?\n/);
      rest = parts.pop();
      for (const part of parts) {
        const data = part.split(/\r?\n/).filter((line) => line.startsWith("data:"));
        if (data.length) yield data.map((line) => line.slice(5).trimStart()).join("\n");
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // of a stream that has failed, which the reader has told already
  }
}
