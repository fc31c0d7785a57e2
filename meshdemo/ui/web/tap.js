// Single requests of one service, live, while somebody looks: sidecars send them only then.

import { pieces } from "./session.js";
import { Table } from "./tables.js";
import { clock, flagWords, ms, setText } from "./words.js";

const ROWS = 100, PER_S = 50;
const FILTERS = ["caller", "route", "instance"];
const by = (id) => document.getElementById(id);

export class Tap {
  constructor(say, commandOf) {
    this.say = say;
    this.commandOf = commandOf;
    this.rows = [];
    this.running = null;
    this.count = 0;
    this.table = new Table(by("tap"), (e) => e.key, [
      (e) => clock(e.time), (e) => e.caller || "(unknown)", (e) => e.instance || e.service, (e) => e.route || "–", (e) => ({ text: `${e.method} ${e.path}`, class: "path" }),
      (e) => ({ text: `${e.failed ? "✗" : "✓"} ${e.status}${e.grpc_status ? ` grpc ${e.grpc_status}` : ""}`, class: `n ${e.failed ? "bad" : "ok"}` }), (e) => ({ text: ms(e.latency_ms), class: "n" }), (e) => flagWords(e.flags),
    ], "Not tapping: no request is looked at.");
    by("tap-toggle").addEventListener("click", () => (this.running ? this.stop() : this.start()));
    for (const name of ["failed", ...FILTERS]) by(`tap-${name}`).addEventListener("change", () => this.again());
  }

  // Anew, with other filters.
  again() {
    const running = this.running !== null;
    this.stop();
    this.command();
    if (running) this.start();
  }

  // What can be filtered by is what there is: callers, routes and instances of the service.
  show(service, snapshot) {
    const other = service !== this.service;
    this.service = service;
    const row = snapshot.services.find((one) => one.name === service);
    const there = {
      caller: snapshot.edges.filter((edge) => edge.service === service && edge.caller).map((edge) => edge.caller),
      route: snapshot.routes.filter((one) => one.service === service && one.route).map((one) => one.route),
      instance: row.versions.flatMap((version) => version.instances.map((instance) => instance.id)),
    };
    for (const name of FILTERS) {
      const select = by(`tap-${name}`), chosen = other ? "" : select.value;
      // What is chosen stays, also while it makes no requests.
      const names = [...new Set([...there[name], ...(chosen ? [chosen] : [])])].sort(), listed = names.join();
      if (!other && select.listed === listed) continue;
      select.listed = listed;
      select.replaceChildren(new Option("any", ""), ...names.map((one) => new Option(one, one, false, one === chosen)));
    }
    this.command();
  }

  filters() {
    const chosen = Object.fromEntries(FILTERS.map((name) => [name, by(`tap-${name}`).value]).filter(([, value]) => value));
    return by("tap-failed").checked ? { ...chosen, failed: "1" } : chosen;
  }

  command() {
    setText(by("tap-command"), this.commandOf(["tap", this.service, ...Object.entries(this.filters()).map(([name, value]) => (name === "failed" ? "--failed" : `--${name} ${value}`))].join(" ")));
  }

  async start() {
    const running = this.running = new AbortController();
    by("tap-toggle").setAttribute("aria-pressed", "true");
    setText(by("tap-toggle"), "■ Stop tapping");
    const query = new URLSearchParams({ service: this.service, max_per_s: PER_S, ...this.filters() });
    this.rows = [];
    let skipped = 0, due = false;
    const draw = () => { due = false; this.table.update(this.rows); setText(by("tap-skipped"), skipped ? `${skipped} more were left out: at most ${PER_S} a second are shown.` : ""); };
    try {
      for await (const line of pieces(`/v1/tap?${query}`, "\n", running.signal)) {
        if (!line.trim()) continue;
        const event = JSON.parse(line);
        skipped += event.skipped ?? 0;
        this.rows.unshift({ ...event, key: this.count += 1, failed: event.status >= 500 || event.status === 0 || event.grpc_status > 0 });
        this.rows.length = Math.min(this.rows.length, ROWS);
        if (!due) { due = true; setTimeout(draw, 250); }
      }
    } catch (error) {
      if (error.name !== "AbortError") this.say(`Tap: ${error.message}`);
    }
    if (this.running === running) this.stop();
  }

  stop() {
    this.running?.abort();
    this.running = null;
    by("tap-toggle").setAttribute("aria-pressed", "false");
    setText(by("tap-toggle"), "▶ Start tapping");
  }
}
