// Single requests of one service, live, while somebody looks: sidecars send them only then.

import { pieces } from "./session.js";
import { Table } from "./tables.js";
import { clock, ms, setText } from "./words.js";

const ROWS = 100, PER_S = 50;
const by = (id) => document.getElementById(id);

export class Tap {
  constructor(say) {
    this.say = say;
    this.rows = [];
    this.running = null;
    this.count = 0;
    this.table = new Table(by("tap"), (e) => e.key, [
      (e) => clock(e.time), (e) => e.caller || "(unknown)", (e) => e.instance, (e) => e.route || "–", (e) => ({ text: `${e.method} ${e.path}`, class: "path" }),
      (e) => ({ text: `${e.failed ? "✗" : "✓"} ${e.status}${e.grpc_status ? ` grpc ${e.grpc_status}` : ""}${e.flags ? ` ${e.flags}` : ""}`, class: `n ${e.failed ? "bad" : "ok"}` }), (e) => ({ text: ms(e.latency_ms), class: "n" }),
    ], "Not tapping: no request is looked at.");
    by("tap-toggle").addEventListener("click", () => (this.running ? this.stop() : this.start()));
    by("tap-failed").addEventListener("change", () => { const again = this.running !== null; this.stop(); this.show(this.service); if (again) this.start(); });
  }

  show(service) {
    this.service = service;
    setText(by("tap-command"), `meshdemo tap ${service}${by("tap-failed").checked ? " --status 5xx" : ""}`);
  }

  async start() {
    const running = this.running = new AbortController();
    by("tap-toggle").setAttribute("aria-pressed", "true");
    setText(by("tap-toggle"), "■ Stop tapping");
    const query = new URLSearchParams({ service: this.service, max_per_s: PER_S });
    if (by("tap-failed").checked) query.set("status", "5xx");
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
