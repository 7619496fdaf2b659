/* All charts share the range of steps, the smoothing and the selected step. */
const data = JSON.parse(document.getElementById("data").textContent);
const HEIGHT = 200, TOP = 12, BOTTOM = 24, RIGHT = 10;
const view = { from: null, to: null, smooth: 0 };

const short = v => {
  if (v === 0) return "0";
  const a = Math.abs(v);
  return a >= 1e6 || a < 1e-4 ? v.toExponential(3).replace(/\.?0+e/, "e").replace("e+", "e")
    : Number(v.toPrecision(5)).toLocaleString("en", { maximumFractionDigits: 8 });
};

function svg(parent, tag, attributes, text) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  return parent.appendChild(element);
}

/* The same tick rules as in report/svg.py, needed here for zooming. */
function linearTicks(low, high, count) {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map(m => m * power).find(s => s >= rough * .999);
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) ticks.push(Number((i * step).toPrecision(12)));
  return ticks;
}

function logTicks(low, high) {
  const ticks = [], wide = Math.log10(high / low) > 3;
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++)
    for (const m of wide ? [1] : [1, 2, 5]) {
      const tick = Number(`${m}e${power}`);
      if (tick >= low * .999 && tick <= high * 1.001) ticks.push(tick);
    }
  return ticks;
}

/* Index of the point with the nearest step; points are sorted by step. */
function nearest(points, step) {
  let low = 0, high = points.length - 1;
  while (high - low > 1) { const mid = (low + high) >> 1; if (points[mid][0] < step) low = mid; else high = mid; }
  return Math.abs(points[low][0] - step) <= Math.abs(points[high][0] - step) ? low : high;
}

/* Moving average over `width` steps around each point, and over fewer near the ends. */
function smoothed(points, width) {
  let sum = 0, from = 0, to = 0;
  return points.map(([step]) => {
    while (to < points.length && points[to][0] <= step + width / 2) sum += points[to++][1];
    while (points[from][0] < step - width / 2) sum -= points[from++][1];
    return [step, sum / (to - from)];
  });
}

function epochAt(step) {
  let found = null;
  for (const [start, epoch] of data.epochs) { if (start > step) break; found = epoch; }
  return found === null ? "" : ` · epoch ${found}`;
}

class Chart {
  constructor(figure, spec) {
    Object.assign(this, { spec, plot: figure.querySelector(".plot"), output: figure.querySelector("output"), off: new Set() });
    this.box = figure.querySelector("label input");
    this.keys = [...figure.querySelectorAll(".key")];
    this.steps = [...new Set(spec.series.flatMap(s => s.points.map(p => p[0])))].sort((a, b) => a - b);
    this.places = this.steps.map(step => [step]);
    if (this.box) this.box.addEventListener("change", () => this.change());
    this.keys.forEach((key, i) => key.addEventListener("click", () => this.toggle(i, key.getAttribute("aria-pressed") !== "true")));
    const on = (name, act) => this.plot.addEventListener(name, act);
    on("pointerdown", event => this.press(event));
    on("pointermove", event => this.drag(event));
    on("pointerup", event => this.release(event));
    on("pointercancel", () => { this.pressed = null; });
    on("pointerleave", () => { if (!this.pressed) showAll(null); });
    on("dblclick", () => look(null, null));
    on("focus", () => this.output.setAttribute("aria-live", "polite"));
    on("blur", () => { this.output.setAttribute("aria-live", "off"); showAll(null); });
    on("keydown", event => this.move(event));
    new ResizeObserver(() => { if (this.plot.clientWidth !== this.width) this.change(); }).observe(this.plot);
    // Charts are drawn when they scroll into view: with many runs, a page has a million points.
    new IntersectionObserver(([entry]) => { this.near = entry.isIntersecting; this.drawIfDue(this.near); }, { rootMargin: "300px" })
      .observe(this.plot);
  }

  change() {
    this.due = true;
    this.drawIfDue(this.near);
  }

  drawIfDue(seen) { if (seen && this.due && this.plot.clientWidth) this.draw(); }

  toggle(i, shown) {
    this.keys[i].setAttribute("aria-pressed", shown);
    if (shown) this.off.delete(i); else this.off.add(i);
    this.change();
  }

  get shownSeries() { return this.spec.series.filter((_, i) => !this.off.has(i)); }

  /* Touch selects a single step; dragging with a mouse or pen selects a range of steps. */
  press(event) {
    if (event.button === 0 && event.pointerType !== "touch") {
      this.pressed = this.stepAt(event.clientX, false);
      this.plot.setPointerCapture(event.pointerId);
    }
    showAll(this.stepAt(event.clientX));
  }

  drag(event) {
    showAll(this.stepAt(event.clientX));
    if (this.pressed === null) return;
    const [a, b] = [this.pressed, this.stepAt(event.clientX, false)].sort((a, b) => a - b).map(this.x);
    this.choice.setAttribute("x", a); this.choice.setAttribute("width", b - a);
  }

  release(event) {
    const start = this.pressed, stop = this.stepAt(event.clientX, false);
    if (start === null) return;
    this.pressed = null;
    this.choice.setAttribute("width", 0);
    if (Math.abs(this.x(start) - this.x(stop)) > 6) look(Math.min(start, stop), Math.max(start, stop));
  }

  move(event) {
    if (event.key === "Escape") look(null, null);
    if (event.key === "+" || event.key === "-") this.closer(event.key === "+" ? .5 : 2);
    const inView = this.steps.filter(step => step >= this.first && step <= this.last), last = inView.length - 1;
    const jump = Math.max(1, Math.round(last / 20));
    const by = { ArrowLeft: -1, ArrowRight: 1, PageDown: -jump, PageUp: jump, Home: -last, End: last }[event.key];
    if (by === undefined || last < 0) return;
    event.preventDefault();
    const now = this.shown === null ? last : inView.indexOf(this.shown);
    showAll(inView[Math.min(last, Math.max(0, now + by))]);
  }

  closer(times) {
    const middle = this.shown === null ? (this.first + this.last) / 2 : this.shown;
    const half = (this.last - this.first) / 2 * times;
    if (middle - half <= this.steps[0] && middle + half >= this.steps[this.steps.length - 1]) look(null, null);
    else look(middle - half, middle + half);
  }

  draw() {
    this.due = false;
    const log = Boolean(this.box && this.box.checked), width = this.width = this.plot.clientWidth, series = this.shownSeries;
    const zoomed = view.from !== null || view.to !== null, usable = v => Number.isFinite(v) && (!log || v > 0);
    const first = this.first = view.from === null ? this.steps[0] : view.from;
    const last = this.last = Math.max(first, view.to === null ? this.steps[this.steps.length - 1] : view.to);
    this.usable = usable;
    this.means = this.spec.series.map(s => view.smooth ? smoothed(s.means || s.points, view.smooth * data.span / 100) : null);
    const inView = points => points.filter(p => p[0] >= first && p[0] <= last).map(p => p[1]);
    let values = [...series.flatMap(s => inView(s.points)), ...(zoomed ? [] : this.spec.references.map(r => r.value)),
      ...(this.spec.zero && !zoomed ? [0] : [])].filter(usable);
    if (!values.length) values = this.spec.series.flatMap(s => s.points.map(p => p[1])).filter(usable);
    let low = values[0], high = values[0];
    for (const v of values) { low = Math.min(low, v); high = Math.max(high, v); }
    const pad = log ? 1.08 : (high - low) * .06 || Math.abs(high) * .1 || 1;
    // The axis of a non-negative quantity does not extend below 0.
    const bottom = log ? low / pad : low >= 0 ? Math.max(0, low - pad) : low - pad, top = log ? high * pad : high + pad;
    const references = this.spec.references.filter(r => usable(r.value) && r.value >= bottom && r.value <= top);
    let ticks = log ? logTicks(bottom, top) : [];
    // A range of less than a power of ten may contain no logarithmic tick.
    if (ticks.length < 2) ticks = linearTicks(bottom, top, 6);
    const left = 10 + 7 * Math.max(...ticks.map(t => short(t).length), 2), f = log ? Math.log : v => v;
    this.x = s => first === last ? (left + width - RIGHT) / 2 : left + (s - first) / (last - first) * (width - RIGHT - left);
    this.y = v => TOP + (f(top) - f(v)) / (f(top) - f(bottom)) * (HEIGHT - TOP - BOTTOM);
    this.back = x => first + Math.min(1, Math.max(0, (x - left) / (width - RIGHT - left))) * (last - first);
    this.plot.replaceChildren();
    const root = this.root = svg(this.plot, "svg", { viewBox: `0 0 ${width} ${HEIGHT}`, "aria-hidden": true });
    for (const tick of ticks) {
      svg(root, "line", { class: "grid", x1: left, x2: width - RIGHT, y1: this.y(tick), y2: this.y(tick) });
      svg(root, "text", { x: left - 7, y: this.y(tick) + 4, "text-anchor": "end" }, short(tick));
    }
    for (const tick of linearTicks(first, last > first ? last : first + 1, width < 420 ? 4 : 7)) if (tick <= last)
      svg(root, "text", { x: this.x(tick), y: HEIGHT - 5, "text-anchor": this.x(tick) > width - 30 ? "end" : "middle" }, short(tick));
    const clip = svg(svg(root, "clipPath", { id: `clip${charts.indexOf(this)}` }), "rect", {});
    for (const [name, value] of Object.entries({ x: left - 4, y: 0, width: Math.max(0, width - RIGHT - left + 8), height: HEIGHT - BOTTOM + 4 }))
      clip.setAttribute(name, value);
    const curves = svg(root, "g", { "clip-path": `url(#clip${charts.indexOf(this)})` });
    const drawn = this.spec.series.map((s, i) => [s, this.means[i]]).filter((_, i) => !this.off.has(i));
    for (const [s, mean] of drawn) this.curve(curves, s, s.points, mean ? " faint" : s.thin ? " thin" : "");
    for (const [s, mean] of drawn) if (mean) this.curve(curves, s, mean, "");
    this.lines(references, left, width);
    this.choice = svg(root, "rect", { class: "choice", x: 0, y: TOP, width: 0, height: HEIGHT - TOP - BOTTOM });
    this.marks = svg(root, "g", { class: "marks" });
    this.pressed = null;
    this.show(null);
  }

  lines(references, left, width) {
    const at = v => this.y(v) - 5;
    references.sort((a, b) => b.value - a.value).forEach((r, i) => {
      const y = this.y(r.value), crowded = i > 0 && at(r.value) - at(references[i - 1].value) < 15;
      svg(this.root, "line", { class: "reference", x1: left, x2: width - RIGHT, y1: y, y2: y });
      svg(this.root, "text", { class: "label", x: width - RIGHT, y: crowded || y < TOP + 6 ? y + 14 : y - 5, "text-anchor": "end" }, r.label);
    });
  }

  curve(parent, series, points, look) {
    const color = `var(--s${series.color})`, shown = points.filter(p => this.usable(p[1]));
    const path = shown.map((p, i) => `${i ? "L" : "M"}${this.x(p[0]).toFixed(1)} ${this.y(p[1]).toFixed(1)}`).join("");
    svg(parent, "path", { d: path, class: `line d${series.dash}${look}`, style: `stroke:${color}` });
    if (shown.length <= 40 && !look)
      for (const p of shown) svg(parent, "circle", { cx: this.x(p[0]), cy: this.y(p[1]), r: 3, style: `fill:${color}` });
  }

  stepAt(clientX, snapped = true) {
    const step = this.back(clientX - this.plot.getBoundingClientRect().left);
    return snapped ? this.steps[nearest(this.places, step)] : step;
  }

  show(step) {
    const shown = this.spec.series.map((series, i) => {
      const points = series.points, ends = points[points.length - 1][0];
      // Before its start and after its end, a curve has no value: at more than 1.5 point distances.
      const reach = points.length > 1 ? 1.5 * (ends - points[0][0]) / (points.length - 1) : Infinity;
      const point = points[step === null ? points.length - 1 : nearest(points, step)];
      const mean = this.means[i] && this.means[i][step === null ? this.means[i].length - 1 : nearest(this.means[i], step)];
      return step !== null && Math.abs(point[0] - step) > Math.max(reach, 1) ? null : { point, mean };
    });
    const lasts = new Set(shown.map(one => one && one.point[0])), last = this.steps[this.steps.length - 1];
    const at = step === null ? last : this.steps[nearest(this.places, step)];
    this.shown = step === null ? null : at;
    this.marks.replaceChildren();
    if (step !== null && at >= this.first && at <= this.last)
      svg(this.marks, "line", { class: "cursor", x1: this.x(at), x2: this.x(at), y1: TOP, y2: HEIGHT - BOTTOM });
    shown.forEach((one, i) => {
      if (step !== null && one && !this.off.has(i) && this.usable(one.point[1]) && one.point[0] >= this.first && one.point[0] <= this.last)
        svg(this.marks, "circle", { cx: this.x(one.point[0]), cy: this.y(one.point[1]), r: 4.5, style: `fill:var(--s${this.spec.series[i].color})` });
      this.keys[i].querySelector("b").textContent = one ? short(one.point[1]) : "–";
      this.keys[i].querySelector("small").textContent = one && one.mean ? `mean ${short(one.mean[1])}` : "";
    });
    this.output.querySelector(".at").textContent =
      step === null && lasts.size > 1 ? "last values" : `step ${short(at)}${epochAt(at)}`;
  }
}

const charts = [];
document.querySelectorAll(".chart").forEach((figure, i) => charts.push(new Chart(figure, data.charts[i])));
data.span = Math.max(0, ...charts.map(chart => chart.steps[chart.steps.length - 1] - chart.steps[0]));

addEventListener("beforeprint", () => charts.forEach(chart => chart.drawIfDue(true)));
let asked = null, waiting = false;
/* Select one step in all charts. */
function showAll(step) {
  asked = step;
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => { waiting = false; charts.forEach(chart => chart.root && chart.show(asked)); });
}

const tools = document.getElementById("tools");
/* Set the visible range of steps; null means the first or last step of each chart. */
function look(from, to) {
  view.from = from === null ? null : Math.max(0, Math.floor(from));
  view.to = to === null ? null : Math.max(Math.ceil(to), view.from + 1);
  tools.elements.from.value = view.from === null ? "" : view.from;
  tools.elements.to.value = view.to === null ? "" : view.to;
  charts.forEach(chart => chart.change());
}

if (tools) {
  const number = text => text === "" || !Number.isFinite(Number(text)) ? null : Number(text);
  const { from, to, smooth, shown } = tools.elements;
  const bounds = () => look(number(from.value), number(to.value));
  from.addEventListener("change", bounds);
  to.addEventListener("change", bounds);
  smooth.addEventListener("input", () => {
    view.smooth = Number(smooth.value);
    shown.textContent = view.smooth ? `${view.smooth} % of steps` : "off";
    charts.forEach(chart => chart.change());
  });
  tools.addEventListener("submit", event => event.preventDefault());
  tools.addEventListener("reset", event => { event.preventDefault(); look(null, null); });
  for (const key of tools.querySelectorAll(".key")) key.addEventListener("click", () => {
    const shown = key.getAttribute("aria-pressed") !== "true";
    key.setAttribute("aria-pressed", shown);
    for (const chart of charts) chart.keys.forEach((own, i) => {
      if (own.dataset.series === key.dataset.series) chart.toggle(i, shown);
    });
  });
}
