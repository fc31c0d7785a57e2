// Wires the page: one stream of snapshots in; the graph, the history and the tables out.

import { dialogs } from "./dialogs.js";
import { Graph } from "./graph.js";
import { History } from "./history.js";
import { call, follow, signIn } from "./session.js";
import { Table, tabs } from "./tables.js";
import { Tap } from "./tap.js";
import { clock, eventName, eventText, faultEffect, faultPlace, isSlow, isUnwell, ms, percent, plural, rate, setAttribute, setText, state, withMs } from "./words.js";

const KEEP_S = 600, EVENTS = 1000, ROWS = 200;
const DEFAULT_NAME = "mesh-demo"; // of a mesh; as in meshdemo/cli
const SPANS = [60, 120, 300, KEEP_S];
const by = (id) => document.getElementById(id);
const number = (text) => ({ text, class: "n" });
// A row that is slow is marked at its latency, not at its success.
const success = (row) => (isSlow(row) ? { text: `✓ ${percent(row.success_rate)}`, class: "n ok" } : { text: `${state(row).symbol} ${percent(row.success_rate)}`, class: `n ${state(row).class}` });
const slowest = (row) => (isSlow(row) ? { text: `${state(row).symbol} ${ms(row.p95_ms)}`, class: `n ${state(row).class}` } : number(ms(row.p95_ms)));

let snapshot = null, chosen = null, journal = [], historyOf = null, points = [];

const graph = new Graph(by("graph"), choose);
const chart = new History(by("history"));
const tap = new Tap(say, (words) => command(words));
const routes = new Table(by("routes"), (r) => r.route, [
  (r) => r.route || "(no route fits)", (r) => number(rate(r.rps)), success, (r) => number(percent(r.effective_success_rate)),
  (r) => number(ms(r.p50_ms)), slowest, (r) => number(ms(r.p99_ms)),
], "No requests.");
const edges = new Table(by("edges"), (e) => `${e.caller}>${e.service}`, [
  (e) => e.caller || "(unknown)", (e) => e.service,
  (e) => !(e.requests || e.denied) ? "–" : e.secured ? { text: "✓ mutual TLS", class: "ok" } : { text: "✗ plain text", class: "bad" },
  (e) => number(rate(e.rps)), success, (e) => number(e.denied ? String(e.denied) : "–"), (e) => (e.refused ? { text: `⊘ ${rate(e.refused)}/s`, class: "n warn" } : number("–")), (e) => `${e.identity || "–"} → ${e.service_identity || "–"}`,
], "Nobody calls anybody.");
const incidents = new Table(by("incidents"), (e) => String(e.seq), [
  (e) => clock(e.time), eventName, (e) => e.target || e.instance || e.service || "", (e) => ({ text: eventText(e), class: "wide" }),
], "Nothing has happened yet.");

function choose(name) {
  if (name === chosen) return;
  chosen = name;
  tap.stop();
  render();
  loadHistory();
}

// --- what happened ------------------------------------------------------------------------------------

// What the journal says of a service, as bars for its time line: from a fault's beginning to its end, from a
// violation to its healing, and the remedies between.
function marks(name) {
  const faults = new Map(), open = new Map(), out = [];
  for (const fault of snapshot.faults) if (fault.service === name) faults.set(fault.id, { kind: "fault", class: "fault", symbol: "⚡", word: "fault", text: faultText(fault), start: fault.started_at, end: null });
  for (const event of journal) {
    if (event.service !== name) continue;
    const bar = { start: event.time, end: event.time, text: event.objective ?? "" };
    switch (event.event) {
      case "fault":
        if (!faults.has(event.fault)) faults.set(event.fault, { kind: "fault", class: "fault", symbol: "⚡", word: "fault", text: faultText(event), start: event.started_at ?? event.time, end: null });
        break;
      case "fault_cleared": case "fault_expired": {
        const fault = faults.get(event.fault);
        if (fault) fault.end = event.time;
        break;
      }
      case "violated":
        if (!open.has(event.objective)) open.set(event.objective, { ...bar, kind: "violated", class: "violation", symbol: "✗", word: "violated", end: null });
        break;
      case "healed": case "gave_up": {
        const violation = open.get(event.objective);
        open.delete(event.objective);
        if (violation) { violation.end = event.time; out.push(violation); }
        if (violation) violation.text += event.event === "gave_up" ? " → ✗ gave up" : ` → ✓ healed${event.recover_s === undefined ? "" : ` after ${event.recover_s.toFixed(1)} s`}`;
        break;
      }
      case "canary": // it tells of its shifts of traffic itself
        if (out.at(-1)?.word === "traffic" && event.time - out.at(-1).start < 1) out.pop();
      // falls through
      case "traffic": case "access":
        out.push({ ...bar, kind: "change", class: "change", symbol: "⇄", word: event.event, text: changeText(event) });
        break;
      case "acted":
        out.push({ ...bar, kind: "remedy", class: "remedy", symbol: "◆", word: "remedy", text: [event.remedy, event.target].filter(Boolean).join(" ") });
    }
  }
  // A fault of the journal that is neither in force nor known to have ended was ended while nobody looked.
  const inForce = new Set(snapshot.faults.map((fault) => fault.id));
  for (const [id, fault] of faults) if (fault.end === null && !inForce.has(id)) fault.end = fault.start;
  return [...faults.values(), ...open.values(), ...out].sort((a, b) => a.start - b.start);
}

// A canary's shifts are changes of traffic, too, and say so themselves.
const changeText = (event) => `${event.event === "traffic" ? "" : `${event.event}: `}${eventText(event)}`;

const faultText = (fault) => `${faultEffect(fault)} on ${faultPlace(fault)}`;

// The last incident of a service in one line, cause to healing.
function lastIncident(name) {
  const events = journal.filter((event) => event.service === name && event.incident !== undefined);
  const last = events.at(-1)?.incident;
  const steps = events.filter((event) => event.incident === last && ["violated", "localised", "acted", "healed", "gave_up"].includes(event.event));
  if (!steps.length) return "";
  return `Last incident, ${clock(steps[0].time)}: ${steps.map((event) => ({
    violated: () => `✗ ${event.objective} violated${event.detect_s === undefined ? "" : `, seen after ${event.detect_s.toFixed(1)} s`}`,
    localised: () => `${event.scope} ${event.target}`,
    acted: () => `◆ ${[event.remedy, event.target].filter(Boolean).join(" ")}`,
    healed: () => `✓ healed${event.recover_s === undefined ? "" : ` after ${event.recover_s.toFixed(1)} s`}`,
    gave_up: () => "✗ gave up",
  })[event.event]()).join(" → ")}`;
}

// --- drawing --------------------------------------------------------------------------------------------

// The command that gives the same, for this mesh.
const command = (words) => `meshdemo ${snapshot.mesh === DEFAULT_NAME ? "" : `--name ${snapshot.mesh} `}${words}`;

function summary() {
  const unwell = snapshot.services.filter(isUnwell), silent = snapshot.services.filter((service) => state(service).word === "silent");
  const parts = [];
  if (unwell.length) parts.push(`${unwell.some((service) => state(service).class === "bad") ? "✗" : "!"} ${unwell.slice(0, 4).map((service) => `${service.name} ${state(service).word}: ${state(service).word === "hung" ? "no answers" : isSlow(service) ? service.why : `${percent(service.success_rate)} success`}`).join("; ")}${unwell.length > 4 ? `; ${unwell.length - 4} more` : ""}`);
  for (const service of snapshot.services) if (service.refused) parts.push(`⊘ ${service.name} refuses ${rate(service.refused)}/s, by a breaker`);
  if (silent.length) parts.push(`? ${plural(silent.length, "service")} silent`);
  if (!parts.length) parts.push("✓ All services answer well");
  if (snapshot.faults.length) parts.push(`⚡ ${plural(snapshot.faults.length, "fault")} in force`);
  setText(by("summary"), parts.join("  ·  "));
  setAttribute(by("summary"), "title", parts.join("\n"));
  setAttribute(by("summary"), "class", unwell.some((service) => state(service).class === "bad") ? "bad" : unwell.length || silent.length || snapshot.services.some((service) => service.refused) ? "warn" : "ok");
}

function figures() {
  const service = snapshot.services.find((one) => one.name === chosen), now = state(service);
  const tiles = {
    rps: [rate(service.rps), ""], success: [percent(service.success_rate), isSlow(service) ? "ok" : now.class],
    effective: service.effective_success_rate !== null && service.effective_success_rate < service.success_rate - 0.01 ? [`! ${percent(service.effective_success_rate)}`, "warn"] : [percent(service.effective_success_rate), ""], p50: [withMs(service.p50_ms), ""],
    p95: [withMs(service.p95_ms), isSlow(service) ? now.class : ""], p99: [withMs(service.p99_ms), ""],
    ejected: ejected(service),
    refused: [service.refused || service.denied ? `${rate((service.refused ?? 0) + (service.denied ?? 0))}/s` : "none", service.refused || service.denied ? "warn" : ""],
  };
  setText(by("now-state"), `${now.symbol} ${now.word}${service.why ? `: ${service.why}` : ""}`);
  setAttribute(by("now-state"), "class", now.class);
  for (const name in tiles) {
    setText(by(`now-${name}`), tiles[name][0]);
    setAttribute(by(`now-${name}`), "class", tiles[name][1]);
  }
}

// Instances that get no requests: those that Envoy keeps out, and those that watch or a person took out.
function ejected(service) {
  const instances = service.versions.flatMap((version) => version.instances);
  const out = service.versions.reduce((sum, version) => sum + Math.max(version.outliers ?? 0, version.instances.filter((instance) => instance.ejected).length), 0);
  return out ? [`${out} of ${instances.length}`, "warn"] : ["none", ""];
}

// As watch judges them, while one runs.
const HEALTH = { ok: ["✓", "holds", "ok"], unknown: ["?", "unknown", "off"], violated: ["✗", "violated", "bad"], healing: ["↻", "healing", "warn"] };
function objectives() {
  const rows = snapshot.objectives.filter((row) => row.service === chosen), list = by("objectives");
  by("unwatched").hidden = snapshot.objectives.length > 0;
  setText(by("watch-command"), command("watch"));
  while (list.children.length > rows.length) list.lastChild.remove();
  rows.forEach((row, index) => {
    const [symbol, word, kind] = HEALTH[row.health] ?? HEALTH.unknown;
    const item = list.children[index] ?? list.appendChild(document.createElement("li"));
    setText(item, `${symbol} ${row.objective} ${word} (${row.text}), error budget left ${Math.floor(row.budget_left * 100)} %`);
    setAttribute(item, "class", kind);
  });
}

function render() {
  if (!snapshot) return;
  setText(by("mesh"), snapshot.mesh);
  setText(by("app"), `${snapshot.app} · revision ${snapshot.revision}`);
  const names = snapshot.services.map((service) => service.name), select = by("service");
  if (!names.includes(chosen)) { chosen = names.includes(snapshot.front) ? snapshot.front : names[0]; loadHistory(); }
  const listed = names.join();
  if (select.listed !== listed) { select.listed = listed; select.replaceChildren(...names.map((name) => new Option(name, name))); }
  snapshot.services.forEach((service, index) => setText(select.options[index], `${state(service).symbol} ${service.name}`));
  if (select.value !== chosen) select.value = chosen;
  summary();
  figures();
  objectives();
  graph.update(snapshot, chosen);
  by("fit").hidden = !graph.overflows && !graph.fit;
  setAttribute(by("main"), "class", graph.large ? "large" : "");
  chart.update(chosen, points, snapshot.time, marks(chosen), span());
  setText(by("last-incident"), lastIncident(chosen));
  if (!by("panel-routes").hidden) routes.update(snapshot.routes.filter((row) => row.service === chosen));
  if (!by("panel-edges").hidden) edges.update(snapshot.edges);
  if (!by("panel-incidents").hidden) incidents.update(journal.slice(-ROWS).reverse());
  const clear = by("clear-button");
  clear.disabled = !snapshot.faults.length;
  setText(clear, snapshot.faults.length ? `Clear ${plural(snapshot.faults.length, "fault")} …` : "No fault to clear");
  const seconds = `--window ${snapshot.window_s}s`;
  setText(by("graph-command"), `${command(`stat --by instance ${seconds}`)}; ${command(`edges ${seconds}`)}`);
  setText(by("history-command"), command(`stat ${chosen} ${seconds}`));
  setText(by("routes-command"), command(`stat ${chosen} --by route ${seconds}`));
  setText(by("edges-command"), command(`edges ${seconds}`));
  setText(by("incidents-command"), command("report"));
  tap.show(chosen, snapshot);
}

// What is asked for; else what there is to show, so that the first minute of a mesh is not a sliver.
function span() {
  const known = points.length ? snapshot.time - points[0].time : 0;
  return Number(by("span").value) || SPANS.find((one) => known < one) || KEEP_S;
}

function take(data) {
  const start = performance.now();
  const first = snapshot === null;
  snapshot = JSON.parse(data);
  const service = snapshot.services.find((one) => one.name === historyOf);
  if (service && !(points.at(-1)?.time > snapshot.time - 0.9)) points.push({ ...service, versions: undefined, time: snapshot.time });
  while (points.length && points[0].time < snapshot.time - KEEP_S) points.shift();
  render();
  performance.measure(first ? "first update" : "update", { start });
}

// --- what comes from the control plane ----------------------------------------------------------------

async function loadHistory() {
  const name = chosen;
  try {
    const { columns, points: rows } = await call("GET", `/v1/history?service=${encodeURIComponent(name)}`);
    if (name !== chosen) return;
    const found = rows.map((row) => Object.fromEntries(columns.map((column, index) => [column, row[index]])));
    // A control plane that was restarted has forgotten what this page may still know.
    const older = name === historyOf ? points.filter((point) => point.time < (found[0]?.time ?? Infinity) - 0.5) : [];
    points = [...older, ...found];
    historyOf = name;
    render();
  } catch { /* the stream says that the control plane is gone, and this is called again once it is back */ }
}

const AWAY = "The control plane does not answer; trying again.";
function trouble(text) {
  setText(by("summary"), `✗ ${text}`);
  setAttribute(by("summary"), "class", "bad");
}

function connect() {
  follow("/v1/stream", {
    opened: () => { journal = []; if (chosen) loadHistory(); },
    event: (name, data) => {
      if (name === "journal") journal = [...journal, ...JSON.parse(data)].slice(-EVENTS);
      else if (name === "snapshot") take(data);
    },
    lost: (refused) => trouble(refused ? "Not signed in any more: open the link that meshdemo dashboard prints." : `${AWAY} The figures below are the last that it sent.`),
  });
}

// `on`: until something else is said.
let hush = 0;
function say(text, on = false) {
  by("said").textContent = text;
  clearTimeout(hush);
  if (!on) hush = setTimeout(() => { by("said").textContent = ""; }, 8000);
}

// Each command can be taken along.
function copying(line) {
  const code = line.querySelector("code"), button = Object.assign(document.createElement("button"), { type: "button", className: "copy", textContent: "Copy" });
  button.setAttribute("aria-label", "Copy this command");
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(code.textContent);
      setText(button, "✓ Copied");
    } catch {
      getSelection().selectAllChildren(code);
      setText(button, "Selected");
    }
    setTimeout(() => setText(button, "Copy"), 2000);
  });
  line.append(button);
}

// --- start ---------------------------------------------------------------------------------------------

by("service").addEventListener("change", (event) => { choose(event.target.value); graph.reveal(chosen); });
by("span").addEventListener("change", render);
by("fit").addEventListener("click", () => {
  graph.fit = !graph.fit;
  by("fit").setAttribute("aria-pressed", graph.fit);
  render();
});
tabs(by("tabs"), (id) => { if (id !== "tab-tap") tap.stop(); render(); });
dialogs({ snapshot: () => snapshot, chosen: () => chosen, call, say, command, faultText });
document.querySelectorAll("p.command").forEach(copying);

if (await signIn(() => trouble(AWAY))) connect();
else trouble("Not signed in: open the link that meshdemo dashboard prints.");
