// Wires the page: one stream of snapshots in, the graph, the history and the tables out; dialogs change the mesh.

import { Graph } from "./graph.js";
import { History } from "./history.js";
import { Table, tabs } from "./tables.js";
import { clock, ms, percent, rate, setText, state } from "./words.js";

const KEEP_S = 600, TAP_ROWS = 200;
const by = (id) => document.getElementById(id);
const number = (text) => ({ text, class: "n" });
const success = (row, value) => ({ text: `${state(row).symbol} ${percent(value)}`, class: `n ${state(row).class}` });

let snapshot = null, chosen = null, history = new Map(), journal = [], tapping = null;

const graph = new Graph(by("graph"), choose);
const chart = new History(by("history"));
const routes = new Table(by("routes"), (r) => r.route, [
  (r) => r.route, (r) => number(rate(r.rps)), (r) => success(r, r.success_rate), (r) => number(percent(r.effective_success_rate)),
  (r) => number(ms(r.p50_ms)), (r) => number(ms(r.p95_ms)), (r) => number(ms(r.p99_ms)),
]);
const edges = new Table(by("edges"), (e) => `${e.caller}>${e.service}`, [
  (e) => e.caller, (e) => e.service, (e) => ({ text: e.secured ? "🔒 mutual TLS" : "🔓 plain text", class: e.secured ? "ok" : "bad" }),
  (e) => e.identity || "–", (e) => number(rate(e.rps)), (e) => success(e, e.success_rate),
]);
const incidents = new Table(by("incidents"), (e) => String(e.seq), [
  (e) => clock(e.time), (e) => e.event, (e) => e.target || e.service || "", (e) => ({ text: describe(e), class: "wide" }),
]);

function describe(event) {
  const parts = [event.rule && `rule ${event.rule}`, event.remedy && `remedy ${event.remedy}`, event.detail,
    event.detect_s !== undefined && event.detect_s !== null && `detected after ${event.detect_s.toFixed(1)} s`,
    event.recover_s !== undefined && event.recover_s !== null && `recovered after ${event.recover_s.toFixed(1)} s`];
  return parts.filter(Boolean).join(", ");
}

// What the journal says, as bands and marks of one service's time line.
function marks(name) {
  const out = [];
  let open = null;
  for (const fault of snapshot.faults) if (fault.service === name) out.push({ kind: "fault", start: fault.started_at, end: null, text: faultText(fault) });
  for (const event of journal) {
    if (event.service && event.service !== name) continue;
    if (event.event === "fault_cleared") out.push({ kind: "fault", start: event.started_at ?? event.time, end: event.time, text: event.detail ?? "cleared" });
    if (event.event === "violated" && !open) { open = { kind: "violated", start: event.time, end: null, text: event.objective ?? "" }; out.push(open); }
    if (event.event === "healed" || event.event === "gave_up") { if (open) open.end = event.time; open = null; }
    if (["acted", "healed", "gave_up"].includes(event.event)) out.push({ kind: event.event, start: event.time, end: event.time, text: [event.remedy, event.target].filter(Boolean).join(" ") });
  }
  return out;
}

function faultText(fault) {
  const where = fault.instance ?? [fault.service, fault.version].filter(Boolean).join(" ");
  const what = fault.kind === "degrade" ? [fault.lat_ms && `${fault.lat_ms} ms`, fault.err_rate && `${percent(fault.err_rate)} errors`].filter(Boolean).join(", ") : fault.kind;
  return `${where}: ${what}`;
}

function choose(name) {
  chosen = name;
  by("service").value = name;
  stopTap();
  render();
}

function summary() {
  const failing = snapshot.services.filter((service) => ["failing", "degraded"].includes(state(service).word));
  if (snapshot.faults.length) setText(by("summary"), `⚡ ${snapshot.faults.length} fault${snapshot.faults.length > 1 ? "s" : ""} injected${failing.length ? `; ${failing.map((s) => `${s.name} ${percent(s.success_rate)}`).join(", ")}` : "; all services answer well"}`);
  else if (failing.length) setText(by("summary"), `✕ ${failing.map((service) => `${service.name}: ${percent(service.success_rate)} success`).join("; ")}`);
  else setText(by("summary"), "✓ All services answer well");
}

function render() {
  if (!snapshot) return;
  setText(by("mesh"), snapshot.mesh);
  setText(by("app"), `app ${snapshot.app}, revision ${snapshot.revision}`);
  const names = snapshot.services.map((service) => service.name), select = by("service");
  if (!names.includes(chosen)) chosen = names.includes(snapshot.front) ? snapshot.front : names[0];
  if ([...select.options].map((o) => o.value).join() !== names.join()) select.replaceChildren(...names.map((name) => new Option(name, name)));
  select.value = chosen;
  summary();
  graph.update(snapshot, chosen);
  chart.update(chosen, history.get(chosen) ?? [], snapshot.time, marks(chosen));
  routes.update(snapshot.routes.filter((row) => row.service === chosen));
  edges.update(snapshot.edges);
  incidents.update(journal.slice(-200).reverse());
  setText(by("history-command"), `meshdemo stat ${chosen} --window 10s`);
  setText(by("routes-command"), `meshdemo stat ${chosen} --by route`);
  setText(by("tap-command"), `meshdemo tap ${chosen}${by("tap-failed").checked ? " --status 5xx" : ""}`);
}

function take(next) {
  const start = performance.now();
  snapshot = next;
  for (const service of next.services) {
    const points = history.get(service.name) ?? [];
    points.push({ time: next.time, rps: service.rps, success_rate: service.success_rate, p50_ms: service.p50_ms, p95_ms: service.p95_ms, p99_ms: service.p99_ms });
    while (points.length && points[0].time < next.time - KEEP_S) points.shift();
    history.set(service.name, points);
  }
  render();
  performance.measure("update", { start });
}

function connect() {
  const stream = new EventSource("/v1/stream");
  stream.addEventListener("history", (event) => { history = new Map(Object.entries(JSON.parse(event.data))); });
  stream.addEventListener("journal", (event) => { journal = [...journal, ...JSON.parse(event.data)].slice(-1000); });
  stream.addEventListener("snapshot", (event) => take(JSON.parse(event.data)));
  stream.addEventListener("open", () => { journal = []; });
  stream.addEventListener("error", () => setText(by("summary"), "✕ The control plane does not answer; trying again … The figures below are the last that it sent."));
}

async function call(method, path, body) {
  const answer = await fetch(path, { method, headers: { "Content-Type": "application/json", "X-Meshdemo": "page" }, body: body === undefined ? undefined : JSON.stringify(body) });
  const result = answer.status === 204 ? {} : await answer.json();
  if (!answer.ok) throw new Error([result.error, result.remedy].filter(Boolean).join(" – "));
  return result;
}

async function act(words, work) {
  try {
    const result = await work();
    const effect = result.effect;
    say(words + (effect ? `: in force in ${effect.effective_ms.toFixed(0)} ms on ${effect.sidecars} sidecar${effect.sidecars === 1 ? "" : "s"}` : ""));
  } catch (error) { say(`${words}: ${error.message}`); }
}

let hush = 0;
function say(text) {
  by("said").textContent = text;
  clearTimeout(hush);
  hush = setTimeout(() => { by("said").textContent = ""; }, 8000);
}

// --- dialogs -------------------------------------------------------------------------------------------

function dialog(id, { open, change, go }) {
  const element = by(id), form = element.querySelector("form");
  const read = () => Object.fromEntries(new FormData(form));
  const changed = () => { const command = element.querySelector("[data-command]"), text = change?.(read()); if (command && text) setText(command, text); };
  document.querySelector(`[data-dialog="${id}"]`).addEventListener("click", () => {
    if (!snapshot) return;
    for (const select of element.querySelectorAll("[data-services]")) {
      const several = select.dataset.services === "versions";
      const names = snapshot.services.filter((service) => !several || service.versions.length > 1).map((service) => service.name);
      select.replaceChildren(...names.map((name) => new Option(name, name, false, name === chosen)));
    }
    element.returnValue = "";
    open?.(read());
    changed();
    element.showModal();
  });
  form.addEventListener("input", changed);
  element.addEventListener("close", () => { if (element.returnValue === "go") go(read()); });
}

const faultCommand = (f) => `meshdemo fault --at mesh --service ${f.service}${Number(f.lat_ms) ? ` --lat ${f.lat_ms}` : ""}${Number(f.err) ? ` --err ${Number(f.err) / 100}` : ""}`;
dialog("fault-dialog", {
  change: faultCommand,
  go: (f) => act(`Fault on ${f.service}`, () => call("POST", "/v1/faults", { at: "mesh", service: f.service, lat_ms: Number(f.lat_ms), err_rate: Number(f.err) / 100 })),
});
dialog("clear-dialog", {
  open: () => setText(by("clear-what"), snapshot.faults.length ? snapshot.faults.map(faultText).join("; ") : "There is none."),
  go: () => act("Faults cleared", () => call("DELETE", "/v1/faults?at=mesh")),
});

function weights() { return [...by("split-weights").querySelectorAll("input")].map((input) => [input.name.slice(2), Number(input.value)]); }
dialog("split-dialog", {
  open: (f) => fillWeights(f.service),
  change: (f) => {
    if (by("split-weights").dataset.service !== f.service) fillWeights(f.service);
    const sum = weights().reduce((total, [, weight]) => total + weight, 0);
    setText(by("split-sum"), !f.service ? "No service has a second version: meshdemo up --version SERVICE=VERSION brings one." : sum === 100 ? "✓ The weights sum to 100." : `✕ The weights sum to ${sum}; they must sum to 100.`);
    by("split-dialog").querySelector("button[value=go]").disabled = sum !== 100;
    return f.service ? `meshdemo traffic set ${f.service} --split ${weights().map(([v, w]) => `${v}=${w}`).join(",")}` : "meshdemo traffic set";
  },
  go: (f) => act(`Traffic of ${f.service}`, () => call("PUT", `/v1/traffic/${encodeURIComponent(f.service)}`, { split: Object.fromEntries(weights()) })),
});
function fillWeights(name) {
  const service = snapshot.services.find((one) => one.name === name), host = by("split-weights");
  host.dataset.service = name ?? "";
  host.replaceChildren(...(service?.versions ?? []).map((version, index) => {
    const input = Object.assign(document.createElement("input"), { type: "number", min: 0, max: 100, step: 1, name: `w-${version.version}`, value: version.weight ?? (index === 0 ? 100 : 0) });
    const label = document.createElement("label");
    label.append(`${version.version}, %`, input);
    return label;
  }));
}
dialog("load-dialog", {
  change: (f) => `meshdemo load --rps ${f.rps}`,
  go: (f) => act(`Load of ${f.rps} requests/s`, () => call("PUT", "/v1/load", { rps: Number(f.rps) })),
});

// --- tap -----------------------------------------------------------------------------------------------

const tapRows = [];
const tapTable = new Table(by("tap"), (e) => e.key, [
  (e) => clock(e.time), (e) => e.caller || "–", (e) => e.instance, (e) => `${e.method} ${e.path}`,
  (e) => ({ text: `${e.failed ? "✕" : "✓"} ${e.status}`, class: `n ${e.failed ? "bad" : "ok"}` }), (e) => number(ms(e.latency_ms)),
]);
let tapKey = 0;
async function startTap() {
  tapping = new AbortController();
  by("tap-toggle").setAttribute("aria-pressed", "true");
  setText(by("tap-toggle"), "Stop tapping");
  const query = new URLSearchParams({ service: chosen, max_rate: "50" });
  if (by("tap-failed").checked) query.set("status", "5xx");
  let rest = "";
  try {
    const answer = await fetch(`/v1/tap?${query}`, { signal: tapping.signal });
    if (!answer.ok) throw new Error((await answer.json()).error);
    for (const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader(); ;) {
      const { value, done } = await reader.read();
      if (done) break;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) if (line.trim()) { const e = JSON.parse(line); tapRows.unshift({ ...e, key: tapKey++, failed: Number(e.status) >= 500 || Number(e.grpc_status) > 0 }); }
      tapRows.length = Math.min(tapRows.length, TAP_ROWS);
      tapTable.update(tapRows);
    }
  } catch (error) { if (error.name !== "AbortError") say(`tap: ${error.message}`); }
  stopTap();
}
function stopTap() {
  tapping?.abort();
  tapping = null;
  by("tap-toggle").setAttribute("aria-pressed", "false");
  setText(by("tap-toggle"), "Start tapping");
}
by("tap-toggle").addEventListener("click", () => (tapping ? stopTap() : startTap()));
by("tap-failed").addEventListener("change", () => { stopTap(); render(); });

// --- start ---------------------------------------------------------------------------------------------

by("service").addEventListener("change", (event) => choose(event.target.value));
tabs(by("tabs"), (id) => { if (id !== "tab-tap") stopTap(); });

// The token comes once, in the fragment, which browsers send to nobody; it is traded for a cookie and forgotten.
async function start() {
  const token = new URLSearchParams(location.hash.slice(1)).get("token");
  if (token) {
    window.history.replaceState(null, "", location.pathname);
    const answer = await fetch("/v1/session", { method: "POST", headers: { Authorization: `Bearer ${token}`, "X-Meshdemo": "page" } });
    if (!answer.ok) return setText(by("summary"), "✕ This link is not valid any more: run meshdemo dashboard again.");
  } else if (!(await fetch("/v1/status")).ok) return setText(by("summary"), "✕ Not signed in: open the link that meshdemo dashboard prints.");
  return connect();
}
start();
