// The golden signals of one service over the last 10 minutes, with faults, violations and remedies drawn into
// the same time line, so that cause and effect are seen together.

import { clock, ms, percent, rate, setAttribute, setText, svg } from "./words.js";

const SPAN_S = 600, WIDTH = 720, LEFT = 56, RIGHT = 8, PLOT = 92, GAP = 26, TOP = 18;
const PANELS = [
  { title: "Requests/s", lines: [["rps", "rps"]], format: rate },
  { title: "Success rate", lines: [["success_rate", "success"]], format: percent, top: 1, bottomOf: (low) => Math.min(0.9, Math.floor(low * 10) / 10) },
  { title: "Latency ms", lines: [["p50_ms", "p50"], ["p95_ms", "p95"], ["p99_ms", "p99"]], format: ms, legend: true },
];
const WORDS = { violated: "objective violated", healed: "healed", acted: "remedy", gave_up: "gave up", fault: "fault" };

export class History {
  constructor(host) {
    const height = TOP + PANELS.length * (PLOT + GAP);
    this.root = svg("svg", { viewBox: `0 0 ${WIDTH} ${height}`, width: "100%", tabindex: 0, role: "img" });
    this.bands = svg("g");
    this.root.append(this.bands);
    this.panels = PANELS.map((panel, index) => this.makePanel(panel, TOP + index * (PLOT + GAP)));
    this.cursor = svg("line", { class: "cursor", y1: TOP, y2: height - GAP, visibility: "hidden" });
    this.root.append(this.cursor);
    this.readout = Object.assign(document.createElement("p"), { className: "hint" });
    this.readout.setAttribute("aria-live", "polite");
    this.list = Object.assign(document.createElement("ul"), { className: "hidden" });
    host.append(this.root, this.readout, this.list);
    this.points = [];
    this.at = null;
    this.root.addEventListener("pointermove", (event) => {
      const box = this.root.getBoundingClientRect();
      this.point(this.from + (((event.clientX - box.left) / box.width) * WIDTH - LEFT) / (WIDTH - LEFT - RIGHT) * SPAN_S);
    });
    this.root.addEventListener("pointerleave", () => this.point(null));
    this.root.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -5, ArrowRight: 5, Home: -SPAN_S, End: SPAN_S }[event.key];
      if (step === undefined) return;
      event.preventDefault();
      this.point(Math.min(this.to, Math.max(this.from, (this.at ?? this.to) + step)));
    });
  }

  makePanel(panel, y) {
    const title = svg("text", { x: LEFT, y: y - 5, class: "name" }, panel.title);
    const high = svg("text", { x: LEFT - 6, y: y + 9, class: "tick", "text-anchor": "end" });
    const low = svg("text", { x: LEFT - 6, y: y + PLOT, class: "tick", "text-anchor": "end" });
    const axis = svg("path", { class: "axis", fill: "none", d: `M${LEFT} ${y}V${y + PLOT}H${WIDTH - RIGHT}` });
    const lines = panel.lines.map(([, name]) => svg("path", { class: `line ${name}` }));
    this.root.append(title, high, low, axis, ...lines);
    if (panel.legend) panel.lines.forEach(([, name], index) => this.root.append(svg("text", { x: LEFT + 110 + index * 60, y: y - 5, class: name }, ["━", "╍", "┅"][index] + " " + name)));
    return { ...panel, y, high, low, elements: lines };
  }

  x(time) { return LEFT + ((time - this.from) / SPAN_S) * (WIDTH - LEFT - RIGHT); }

  update(name, points, now, marks) {
    this.points = points;
    this.to = now;
    this.from = now - SPAN_S;
    for (const panel of this.panels) this.drawPanel(panel);
    this.drawBands(marks);
    const last = points.at(-1);
    setAttribute(this.root, "aria-label", `Golden signals of ${name}, last 10 minutes. Now ${rate(last?.rps)} requests per second, ${percent(last?.success_rate)} success, p99 ${ms(last?.p99_ms)} ms. Arrow keys read single points.`);
    this.point(this.at);
  }

  drawPanel(panel) {
    let low = Infinity, high = 0;
    for (const point of this.points) for (const [key] of panel.lines) {
      const value = point[key];
      if (value === null || value === undefined) continue;
      if (value < low) low = value;
      if (value > high) high = value;
    }
    const top = panel.top ?? Math.max(high * 1.1, 1e-9), bottom = panel.bottomOf && low < Infinity ? panel.bottomOf(low) : 0;
    setText(panel.high, high || panel.top ? panel.format(top) : "");
    setText(panel.low, panel.format(bottom));
    panel.lines.forEach(([key], index) => {
      let path = "", pen = "M", before = -Infinity;
      for (const point of this.points) {
        const value = point[key];
        if (point.time < this.from) continue;
        if (value === null || value === undefined) { pen = "M"; continue; }
        if (point.time - before > 5) pen = "M"; // a gap is a gap, not a line
        path += `${pen}${this.x(point.time).toFixed(1)} ${(panel.y + PLOT - ((value - bottom) / (top - bottom || 1)) * PLOT).toFixed(1)}`;
        pen = "L";
        before = point.time;
      }
      setAttribute(panel.elements[index], "d", path);
    });
  }

  drawBands(marks) {
    const key = JSON.stringify([marks, Math.round(this.to)]);
    if (key === this.drawn) return;
    this.drawn = key;
    const height = TOP + PANELS.length * (PLOT + GAP) - GAP;
    const parts = [], words = [];
    for (const mark of marks) {
      const start = Math.max(mark.start, this.from), end = Math.min(mark.end ?? this.to, this.to);
      if (end < this.from) continue;
      const title = svg("title", {}, `${WORDS[mark.kind] ?? mark.kind}: ${mark.text}, ${clock(mark.start)}`);
      words.push(Object.assign(document.createElement("li"), { textContent: title.textContent }));
      if (mark.kind === "fault" || mark.kind === "violated") {
        parts.push(svg("rect", { class: mark.kind === "fault" ? "fault" : "violation", x: this.x(start), width: Math.max(2, this.x(end) - this.x(start)), y: TOP, height: height - TOP }, title));
      } else parts.push(svg("line", { class: "mark", x1: this.x(start), x2: this.x(start), y1: TOP, y2: height }, title));
      const symbol = { fault: "⚡", violated: "✕", acted: "⚕", healed: "✓", gave_up: "☹" }[mark.kind] ?? "•";
      const above = mark.kind === "fault" || mark.kind === "violated";
      parts.push(svg("text", { x: this.x(start) + (mark.kind === "violated" || mark.kind === "healed" ? 14 : 0), y: above ? 10 : height + 14, class: "tick" }, symbol));
    }
    this.bands.replaceChildren(...parts);
    this.list.replaceChildren(...words);
  }

  point(time) {
    this.at = time;
    let nearest = null;
    if (time !== null) for (const point of this.points) if (!nearest || Math.abs(point.time - time) < Math.abs(nearest.time - time)) nearest = point;
    if (!nearest) {
      this.cursor.setAttribute("visibility", "hidden");
      setText(this.readout, "⚡ fault   ✕ objective violated   ⚕ remedy   ✓ healed");
      return;
    }
    for (const name of ["x1", "x2"]) this.cursor.setAttribute(name, this.x(nearest.time));
    this.cursor.setAttribute("visibility", "visible");
    setText(this.readout, `${clock(nearest.time)}: ${rate(nearest.rps)} requests/s, ${percent(nearest.success_rate)} success, p50 ${ms(nearest.p50_ms)}, p95 ${ms(nearest.p95_ms)}, p99 ${ms(nearest.p99_ms)} ms`);
  }
}
