// The way to the control plane: signing in, calls, and its stream of events.

const HOLD = "meshdemo-key";

// The token comes once, in the fragment, which browsers send to nobody; it is traded for a cookie and a key, and
// forgotten. The key is kept for this origin, so that a reload and a second tab stay signed in.
// `lost` is told of each attempt that got no answer.
export async function signIn(lost) {
  const token = new URLSearchParams(location.hash.slice(1)).get("token");
  if (!token) return localStorage.getItem(HOLD) !== null;
  for (;;) {
    try {
      const answer = await fetch("/v1/session", { method: "POST", headers: { Authorization: `Bearer ${token}` } });
      if (answer.ok) localStorage.setItem(HOLD, (await answer.json()).key);
      // Not before: who reloads meanwhile would have neither the token nor the key.
      history.replaceState(null, "", location.pathname);
      return answer.ok;
    } catch {
      lost();
      await after(1000);
    }
  }
}

const after = (pause) => new Promise((resolve) => setTimeout(resolve, pause));

export class Refused extends Error {}

function request(path, { method = "GET", body, signal } = {}) {
  const headers = { "X-Meshdemo": localStorage.getItem(HOLD) ?? "" };
  if (body !== undefined) headers["Content-Type"] = "application/json";
  return fetch(path, { method, headers, signal, body: body === undefined ? undefined : JSON.stringify(body) });
}

async function checked(answer) {
  if (answer.ok) return answer;
  const said = await answer.json().catch(() => ({}));
  const words = [said.error ?? answer.statusText, said.remedy].filter(Boolean).join(" – ");
  throw answer.status === 401 ? new Refused(words) : new Error(words);
}

export async function call(method, path, body) {
  return (await checked(await request(path, { method, body }))).json();
}

// Pieces of a streamed answer that end with `end`, as they come.
export async function* pieces(path, end, signal) {
  const answer = await checked(await request(path, { signal }));
  let rest = "";
  for (const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader(); ;) {
    const { value, done } = await reader.read();
    if (done) return;
    const found = (rest + value).split(end);
    rest = found.pop();
    yield* found;
  }
}

// Server-sent events for as long as the page is open; a broken stream is begun anew, `lost` is told meanwhile.
// A stream that says nothing for long (its heartbeat comes every five seconds) is broken, too.
export async function follow(path, { opened, event, lost }) {
  for (let pause = 250; ; pause = Math.min(pause * 2, 5000)) {
    const broken = new AbortController();
    let timer = 0;
    const alive = () => { clearTimeout(timer); timer = setTimeout(() => broken.abort(), 15000); };
    try {
      alive();
      opened();
      for await (const block of pieces(path, "\n\n", broken.signal)) {
        alive();
        pause = 250;
        const fields = Object.fromEntries(block.split("\n").map((line) => { const at = line.indexOf(": "); return [line.slice(0, at), line.slice(at + 2)]; }));
        if (fields.event) event(fields.event, fields.data);
      }
    } catch (error) {
      if (error instanceof Refused) return lost(error);
    } finally {
      clearTimeout(timer);
      broken.abort();
    }
    lost(null);
    await after(pause);
  }
}
