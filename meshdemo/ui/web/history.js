// The golden signals of one service over the last minutes, above them on the same time line what happened:
// changes of traffic and access, faults, violated objectives, remedies; so that cause and effect are seen together.

import { clock, html, ms, percent, plural, rate, setAttribute, setText, svg, withMs } from "./words.js";

const LEFT = 66, RIGHT = 10, LANE = 20, LANE_GAP = 3, LARGE = 1760, TITLE = 22, GAP = 12, AXIS = 20;
const LANES = [["change", "change"], ["fault", "fault"], ["violated", "violated"], ["remedy", "remedy"]];
const PANELS = [
  { title: "Requests/s", lines: [["rps", "rps", "answered"], ["refused", "refused", "refused"]], format: (value) => String(value) },
  { title: "Success", lines: [["effective_success_rate", "effective", "after retries"], ["success_rate", "success", "answered"]], format: (value) => `${Number((value * 100).toFixed(1))} %`, top: 1, bottomOf: (low) => Math.max(0, Math.min(0.9, Math.floor(low * 10) / 10)) },
  { title: "Latency", lines: [["p50_ms", "p50", "p50"], ["p95_ms", "p95", "p95"], ["p99_ms", "p99", "p99"]], format: (value) => (value >= 1000 ? `${value / 1000} s` : `${value} ms`) },
];

export class History {
  constructor(host) {
    this.host = host;
    this.root = svg("svg", { tabindex: 0, role: "img", class: "history" });
    this.readout = html("p", { className: "readout" });
    this.readout.setAttribute("aria-live", "polite");
    this.list = html("ul", { className: "hidden" });
    host.append(this.root, this.readout, this.list);
    this.points = [];
    this.marks = [];
    this.span = 600;
    this.at = null;
    Object.assign(this, { given: 600, width: 600, plot: 92, zoom: 1 });
    this.build();
    const fit = () => {
      const zoom = innerWidth >= LARGE ? 1.25 : 1, width = Math.max(280, Math.floor(this.given / zoom));
      // What stands above and below takes about 620 pixels.
      const plot = width < 500 ? 70 : Math.round(Math.max(92, Math.min(200, ((innerHeight - 620) / zoom) / PANELS.length)));
      if (width === this.width && plot === this.plot && zoom === this.zoom) return;
      Object.assign(this, { width, plot, zoom });
      this.build();
      this.draw();
    };
    new ResizeObserver(([entry]) => { this.given = entry.contentRect.width; fit(); }).observe(host);
    addEventListener("resize", fit);
    this.root.addEventListener("pointermove", (event) => {
      const box = this.root.getBoundingClientRect();
      this.point(this.from + (((event.clientX - box.left) / this.zoom - LEFT) / (this.width - LEFT - RIGHT)) * this.span);
    });
    this.root.addEventListener("pointerleave", () => this.point(null));
    this.root.addEventListener("blur", () => this.point(null));
    this.root.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -this.span / 120, ArrowRight: this.span / 120, Home: -this.span, End: this.span }[event.key];
      if (step === undefined) return;
      event.preventDefault();
      this.point(Math.min(this.to, Math.max(this.from, (this.at ?? this.to) + step)));
    });
  }

  // One unit is one pixel, so that the writing has its size on a phone too; on a projector it is a little more.
  build() {
    const plot = this.plot;
    this.root.replaceChildren();
    this.bands = this.root.appendChild(svg("g"));
    this.lanesTop = 2;
    LANES.forEach(([kind, title], index) => {
      const y = this.lanesTop + index * (LANE + LANE_GAP);
      this.root.append(svg("text", { class: "tick", x: LEFT - 8, y: y + 14, "text-anchor": "end" }, title), svg("rect", { class: "lane", x: LEFT, y, width: this.width - LEFT - RIGHT, height: LANE, rx: 3 }));
    });
    this.happened = this.root.appendChild(svg("g"));
    let y = this.lanesTop + LANES.length * (LANE + LANE_GAP) + 4;
    this.panels = PANELS.map((panel) => {
      const top = y + TITLE;
      y = top + plot + GAP;
      return this.makePanel(panel, top, plot);
    });
    this.bottom = y - GAP;
    this.ticks = this.root.appendChild(svg("g"));
    this.ticksOf = 0;
    this.cursor = this.root.appendChild(svg("path", { class: "cursor", visibility: "hidden" }));
    this.height = this.bottom + AXIS;
    for (const [name, value] of [["viewBox", `0 0 ${this.width} ${this.height}`], ["width", this.width * this.zoom], ["height", this.height * this.zoom]]) this.root.setAttribute(name, value);
    this.drawn = "";
  }

  makePanel(panel, y, plot) {
    const right = this.width - RIGHT;
    this.root.append(svg("text", { x: LEFT, y: y - 7, class: "name" }, panel.title));
    const grid = svg("path", { class: "grid", d: `M${LEFT} ${y}H${right}M${LEFT} ${y + plot / 2}H${right}` });
    const ticks = [0, 0.5, 1].map((share) => svg("text", { x: LEFT - 8, y: y + share * plot + 4, class: "tick", "text-anchor": "end" }));
    const lines = panel.lines.map(([, name]) => svg("path", { class: `line ${name}` }));
    const axis = svg("path", { class: "axis", d: `M${LEFT} ${y}V${y + plot}H${right}` });
    this.root.append(grid, ...ticks, axis, ...lines);
    let x = right - panel.lines.reduce((sum, [, , title]) => sum + wide(title), 0);
    const legend = panel.lines.map(([, name, title]) => {
      const group = svg("g", {}, svg("path", { class: `line ${name}`, d: `M${x} ${y - 11}h18` }), svg("text", { class: "tick", x: x + 22, y: y - 7 }, title));
      x += wide(title);
      this.root.append(group);
      return group;
    });
    return { ...panel, y, plot, ticks, elements: lines, legend };
  }

  x(time) { return LEFT + ((time - this.from) / this.span) * (this.width - LEFT - RIGHT); }

  update(name, points, now, marks, span) {
    Object.assign(this, { name, points, marks, span, to: now, from: now - span });
    this.draw();
  }

  draw() {
    if (!this.to) return;
    const shown = this.points.filter((point) => point.time >= this.from - 2);
    for (const panel of this.panels) this.drawPanel(panel, shown);
    this.drawTicks();
    this.drawMarks();
    const last = this.points.at(-1);
    setAttribute(this.root, "aria-label", `Golden signals of ${this.name}, last ${plural(this.span / 60, "minute")}. Now ${rate(last?.rps)} requests per second, ${percent(last?.success_rate)} success, p99 ${withMs(last?.p99_ms)}. Left and right arrow keys read single points.`);
    this.point(this.at);
  }

  drawTicks() {
    if (this.ticksOf === this.span) return;
    this.ticksOf = this.span;
    const steps = this.span % 300 ? 4 : this.width < 500 ? 2 : 5, ticks = [];
    for (let step = 0; step <= steps; step += 1) {
      const ago = Math.round(this.span * (1 - step / steps)), x = LEFT + (step / steps) * (this.width - LEFT - RIGHT), last = step === steps;
      const text = last ? "now" : ago % 60 ? `−${ago} s` : `−${ago / 60} min`;
      ticks.push(svg("path", { class: "grid", d: `M${x} ${this.bottom}v4` }), svg("text", { class: "tick", x: last ? this.width - 2 : x, y: this.bottom + 16, "text-anchor": last ? "end" : "middle" }, text));
    }
    this.ticks.replaceChildren(...ticks);
  }

  drawPanel(panel, points) {
    let low = Infinity, high = 0;
    const used = panel.lines.map(() => false);
    for (const point of points) panel.lines.forEach(([key], index) => {
      const value = point[key];
      if (value === null || value === undefined) return;
      used[index] = true;
      if (value < low) low = value;
      if (value > high) high = value;
    });
    const top = panel.top ?? nice(high), bottom = panel.bottomOf && low < Infinity ? panel.bottomOf(low) : 0;
    [top, Number(((top + bottom) / 2).toPrecision(4)), bottom].forEach((value, index) => setText(panel.ticks[index], points.length ? panel.format(value) : ""));
    panel.lines.forEach(([key], index) => {
      setAttribute(panel.legend[index], "visibility", used[index] || panel.lines.length > 2 ? "visible" : "hidden");
      let path = "", pen = "M", before = -Infinity;
      for (const point of points) {
        const value = point[key];
        if (value === null || value === undefined) { pen = "M"; continue; }
        if (point.time - before > 5) pen = "M"; // a gap is a gap, not a line
        path += `${pen}${Math.max(LEFT, this.x(point.time)).toFixed(1)} ${(panel.y + panel.plot - ((value - bottom) / (top - bottom || 1)) * panel.plot).toFixed(1)}`;
        pen = "L";
        before = point.time;
      }
      setAttribute(panel.elements[index], "d", path);
    });
  }

  // Each kind in its lane, with words where there is room for them; faults and violations shade the charts below.
  drawMarks() {
    const key = JSON.stringify([this.marks, Math.round(this.to), this.span]);
    if (key === this.drawn) return;
    this.drawn = key;
    const bands = [], happened = [], words = [];
    const ends = LANES.map(() => -Infinity);
    const next = new Map(); // where the next mark of the same lane stands, which words must not reach
    const following = this.marks.map(() => Infinity);
    for (let index = this.marks.length - 1; index >= 0; index -= 1) {
      following[index] = next.get(this.marks[index].kind) ?? Infinity;
      next.set(this.marks[index].kind, this.x(this.marks[index].start));
    }
    for (const [index, mark] of this.marks.entries()) {
      const end = Math.min(mark.end ?? this.to, this.to);
      if (end < this.from) continue;
      const lane = LANES.findIndex(([kind]) => kind === mark.kind), y = this.lanesTop + lane * (LANE + LANE_GAP);
      const x1 = this.x(Math.max(mark.start, this.from)), x2 = Math.max(x1 + 4, this.x(end));
      const text = `${mark.symbol} ${mark.text}`;
      words.push(html("li", { textContent: `${clock(mark.start)}: ${mark.word}: ${mark.text}` }));
      const title = svg("title", {}, `${clock(mark.start)} ${mark.word}: ${mark.text}`);
      happened.push(svg("rect", { class: `mark ${mark.class}`, x: x1, y, width: x2 - x1, height: LANE, rx: 3 }, title));
      if (mark.kind === "fault" || mark.kind === "violated") bands.push(svg("rect", { class: `band ${mark.class}`, x: x1, y: this.lanesTop, width: x2 - x1, height: this.bottom - this.lanesTop }));
      else bands.push(svg("path", { class: "moment", d: `M${x1} ${y + LANE}V${this.bottom}` }));
      // The words stand in the bar, or behind it, or (at the right end) before it.
      // Where there is no room for them, a bar has as many as it holds, and a moment its symbol.
      const needs = text.length * 7.1 + 8, right = this.width - RIGHT, inside = x2 - x1 >= needs;
      const before = !inside && x2 + 4 + needs > Math.min(right, following[index]);
      const room = inside ? x1 + 4 : before ? x1 - needs : x2 + 4;
      const shown = room > ends[lane] && room > LEFT, holds = Math.floor((x2 - x1 - 8) / 7.1);
      const said = shown ? text : holds >= 6 ? `${text.slice(0, holds - 1)}…` : Math.max(x1 - 1, ends[lane]) < x2 + 3 ? mark.symbol : "";
      const at = shown ? (before ? x1 - 4 : room) : holds >= 6 ? x1 + 4 : Math.min(x2 + 3, right - 12);
      happened.push(svg("text", { class: `said ${mark.class}`, x: at, y: y + 14, "text-anchor": shown && before ? "end" : "start" }, said));
      ends[lane] = Math.max(x2, shown && !before ? room + needs : holds >= 6 ? x2 : x2 + 14);
    }
    this.bands.replaceChildren(...bands);
    this.happened.replaceChildren(...happened);
    this.list.replaceChildren(...words);
  }

  point(time) {
    this.at = time;
    let nearest = null;
    if (time !== null) for (const point of this.points) if (!nearest || Math.abs(point.time - time) < Math.abs(nearest.time - time)) nearest = point;
    if (!nearest) {
      setAttribute(this.cursor, "visibility", "hidden");
      return setText(this.readout, "Point at the chart, or use the arrow keys, to read it.");
    }
    const x = this.x(nearest.time).toFixed(1);
    setAttribute(this.cursor, "d", `M${x} ${this.lanesTop}V${this.bottom}`);
    setAttribute(this.cursor, "visibility", "visible");
    const then = this.marks.filter((mark) => mark.start <= nearest.time + 1 && nearest.time - 1 <= (mark.end ?? this.to));
    setText(this.readout, `${clock(nearest.time)}: ${rate(nearest.rps)} requests/s, ${percent(nearest.success_rate)} success, p50 ${ms(nearest.p50_ms)}, p95 ${ms(nearest.p95_ms)}, p99 ${withMs(nearest.p99_ms)}${then.map((mark) => ` · ${mark.symbol} ${mark.text}`).join("")}`);
  }
}

// How wide an entry of a legend is, about.
const wide = (title) => 36 + title.length * 6.8;

// The next of 1, 2, 4 times a power of ten, so that the axis does not jump with every point.
function nice(value) {
  if (!(value > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return Number((power * [1, 2, 4, 10].find((step) => step * power >= value)).toPrecision(3));
}
