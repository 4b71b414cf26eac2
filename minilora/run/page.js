"use strict";

// Draws a page of training runs from the JSON in it. What runs have written is set as text, never as HTML.

const content = JSON.parse(document.getElementById("content").textContent);
const names = content.names;
const shown = new Set(names.keys()); // the runs that are drawn, by number
let smoothing = content.window; // records in the mean of the training losses; 1: no mean
let promptsShown = 20;

const PANELS = [
  { name: "loss", title: "Training loss", unit: "nats per supervised token", smooth: true },
  { name: "eval_loss", title: "Held-out loss", unit: "nats per supervised token", dots: true },
  { name: "lr", title: "Learning rate", unit: "", fromZero: true },
  { name: "grad_norm", title: "Gradient norm", unit: "before clipping" },
  { name: "memory", title: "Memory", unit: "GiB, peak so far", fromZero: true, size: 2 ** 30 },
  { name: "tokens_per_second", title: "Speed", unit: "tokens a second", fromZero: true },
];
const HEIGHT = 240, LEFT = 58, RIGHT = 14, TOP = 12, BOTTOM = 34; // of a chart, in pixels
const LAST_STEP = content.curves.flatMap(Object.values).reduce((last, points) => Math.max(last, points[points.length - 1][0]), 1);
const MOST_PALE = 4; // runs in a chart whose unsmoothed losses are drawn, too

// ---- elements ----

function make(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

function makeSvg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children); // a string becomes a text
  return element;
}

function byId(id) {
  return document.getElementById(id);
}

function colour(run) {
  return `run-${run % 10}`;
}

function dashes(run) {
  return ["none", "6 3", "2 3"][Math.floor(run / 10) % 3];
}

function swatch(run) {
  const line = makeSvg("line", { x1: 0, x2: 24, y1: 6, y2: 6, "stroke-width": 3, "stroke-dasharray": dashes(run) });
  return makeSvg("svg", { class: `swatch ${colour(run)}`, viewBox: "0 0 24 12", "aria-hidden": "true" }, line);
}

// ---- numbers ----

function short(value) {
  return String(Number(value.toPrecision(4)));
}

/** The mean of the `window` values around each value, and of fewer at the two ends. */
function centredMean(points, window) {
  const half = Math.floor(window / 2), sums = [0];
  for (const [, value] of points) sums.push(sums[sums.length - 1] + value);
  return points.map(([step], i) => {
    const start = Math.max(0, i - half), stop = Math.min(points.length, i + half + 1);
    return [step, (sums[stop] - sums[start]) / (stop - start)];
  });
}

/** The index of the point whose step is nearest; the points are in the order of their steps. */
function nearest(points, step) {
  let low = 0, high = points.length - 1;
  while (low < high) {
    const middle = Math.floor((low + high) / 2);
    if (points[middle][0] < step) low = middle + 1;
    else high = middle;
  }
  return low > 0 && step - points[low - 1][0] < points[low][0] - step ? low - 1 : low;
}

/** About `count` round numbers between two. */
function ticks(low, high, count) {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= 0.7 * rough);
  const first = Math.ceil(low / step - 1e-9), last = Math.floor(high / step + 1e-9);
  return Array.from({ length: Math.min(last - first + 1, 2 * count) }, (_, i) => (first + i) * step);
}

/** Powers of ten between 10^bottom and 10^top, and their double and their fivefold if those are few. */
function logarithmicTicks(bottom, top) {
  const stride = Math.max(1, Math.ceil((top - bottom) / 8)), found = [];
  for (let power = Math.floor(bottom); power <= top; power += stride)
    for (const factor of top - bottom < 3 ? [1, 2, 5] : [1])
      if (power + Math.log10(factor) >= bottom && power + Math.log10(factor) <= top) found.push(factor * 10 ** power);
  return found;
}

/** The vertical axis for some values: it begins at zero, or fits them, or is logarithmic if they are wide apart. */
function axisFor(values, fromZero) {
  const low = values.reduce((a, b) => Math.min(a, b)), high = values.reduce((a, b) => Math.max(a, b));
  const wide = !fromZero && low > 0 && high > 20 * low;
  const scale = wide ? Math.log10 : (value) => value;
  let bottom = fromZero ? Math.min(0, low) : scale(low), top = scale(high);
  const margin = 0.07 * (top - bottom) || 0.05 * Math.abs(top) || 1;
  top += margin;
  if (!fromZero) bottom = low >= 0 && !wide ? Math.max(0, bottom - margin) : bottom - margin;
  const marks = wide ? logarithmicTicks(bottom, top) : ticks(bottom, top, 5);
  return { marks, at: (value) => TOP + (HEIGHT - TOP - BOTTOM) * (1 - (scale(value) - bottom) / (top - bottom)) };
}

// ---- legend and figures ----

function drawLegend() {
  const buttons = names.map((name, run) => {
    const button = make("button", { type: "button", "aria-pressed": shown.has(run) }, swatch(run), name);
    button.onclick = () => choose(shown.has(run) ? [...shown].filter((other) => other !== run) : [...shown, run]);
    return button;
  });
  if (names.length > 3)
    for (const [label, runs] of [["all", [...names.keys()]], ["none", []]]) {
      const button = make("button", { type: "button" }, label);
      button.onclick = () => choose(runs);
      buttons.push(button);
    }
  byId("legend").replaceChildren(...buttons);
}

function choose(runs) {
  const focused = [...byId("legend").children].indexOf(document.activeElement);
  shown.clear();
  for (const run of runs) shown.add(run);
  drawAll();
  byId("legend").children[focused]?.focus();
}

function drawFigures() {
  const head = make("tr", {}, ...["run", ...content.headings].map((name) => make("th", { scope: "col" }, name)));
  const rows = names.map((name, run) =>
    make("tr", { class: shown.has(run) ? "" : "off" }, make("th", { scope: "row" }, swatch(run), name),
      ...content.figures[run].map((text) => make("td", {}, text))));
  byId("figures").replaceChildren(make("thead", {}, head), make("tbody", {}, ...rows));
}

// ---- charts ----

const charts = [];
let pointed = null; // [chart, step] that the reader points at

/** The figure of a panel, which `drawChart` fills, and what the reader's hand and keys do in it. */
function makeChart(panel) {
  const label = `${panel.title} over the optimizer steps`;
  const svg = makeSvg("svg", { class: "chart", role: "img", tabindex: 0, "aria-label": label, "aria-describedby": "hint" });
  const tip = make("div", { class: "tip", role: "status" });
  const caption = make("figcaption", {}, panel.title, make("span", {}, panel.unit));
  const figure = make("figure", {}, caption, svg, tip);
  const chart = { panel, figure, svg, tip, curves: [], steps: [], cursor: makeSvg("g") };
  if (panel.smooth) addSmoothing(caption);
  svg.onpointermove = svg.onpointerdown = (event) => {
    const x = event.clientX - svg.getBoundingClientRect().left;
    pointAll(chart, ((x - LEFT) / (svg.clientWidth - LEFT - RIGHT)) * LAST_STEP);
  };
  svg.onblur = () => pointAll(chart, null);
  svg.onpointerleave = (event) => event.pointerType === "touch" || pointAll(chart, null); // a lifted finger wants to read
  svg.onkeydown = (event) => {
    const steps = chart.steps;
    const here = chart.step == null ? -1 : steps.indexOf(chart.step);
    const next = { ArrowRight: here + 1, ArrowLeft: here - 1, Home: 0, End: steps.length - 1 }[event.key];
    if (event.key === "Escape") pointAll(chart, null);
    if (next === undefined || !steps.length) return;
    event.preventDefault();
    pointAll(chart, steps[Math.max(0, Math.min(steps.length - 1, next))]);
  };
  return chart;
}

function addSmoothing(caption) {
  const longest = Math.max(...content.curves.map((curves) => curves.loss?.length ?? 0));
  if (longest < 5) return;
  const slider = make("input", { type: "range", min: 1, max: Math.floor(longest / 2) | 1, step: 2, id: "smoothing" });
  const said = make("output", { for: "smoothing" });
  const say = () => { said.textContent = smoothing > 1 ? `over ${smoothing} records` : "off"; };
  slider.value = smoothing;
  slider.oninput = () => { smoothing = Number(slider.value); say(); drawCharts(); };
  say();
  caption.append(make("label", {}, "smoothing", slider, said));
}

/** The steps at which a curve has a value, in their order. */
function stepsOf(curves) {
  return [...new Set(curves.flatMap((curve) => curve.points.map(([step]) => step)))].sort((a, b) => a - b);
}

function drawCharts() {
  for (const chart of charts) drawChart(chart);
  if (pointed) pointAll(...pointed);
}

function drawChart(chart) {
  const { panel, svg } = chart, width = Math.max(svg.clientWidth, 200), size = panel.size ?? 1;
  const scaled = (run) => (content.curves[run][panel.name] ?? []).map(([step, value]) => [step, value / size]);
  const raw = [...shown].sort((a, b) => a - b).map((run) => ({ run, points: scaled(run) })).filter((curve) => curve.points.length);
  const mean = panel.smooth && smoothing > 1;
  chart.curves = mean ? raw.map(({ run, points }) => ({ run, points: centredMean(points, smoothing) })) : raw;
  chart.steps = stepsOf(chart.curves);
  const pale = mean && raw.length <= MOST_PALE ? raw : [];
  const values = [...chart.curves, ...pale].flatMap((curve) => curve.points.map(([, value]) => value));
  chart.cursor = makeSvg("g");
  svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
  if (!values.length) return svg.replaceChildren();
  const y = axisFor(values, panel.fromZero), x = (step) => LEFT + ((width - LEFT - RIGHT) * step) / LAST_STEP;
  chart.at = { x, y: y.at };
  const thin = (points) => (points.length > width / 2 && !mean ? "thin" : "");
  const line = ({ run, points }, kind) => makeSvg("path", {
    class: `curve ${kind || thin(points)} ${colour(run)}`,
    "data-run": run,
    "stroke-dasharray": kind ? "none" : dashes(run),
    d: "M" + points.map(([step, value]) => `${x(step).toFixed(1)} ${y.at(value).toFixed(1)}`).join("L"),
  });
  const dot = (run, [step, value]) => makeSvg("circle", { class: `dot ${colour(run)}`, r: 2.5, cx: x(step), cy: y.at(value) });
  const dots = chart.curves.flatMap(({ run, points }) =>
    panel.dots && points.length < 50 || points.length === 1 ? points.map((point) => dot(run, point)) : []);
  svg.replaceChildren(...axes(width, x, y), ...pale.map((curve) => line(curve, "pale")),
    ...chart.curves.map((curve) => line(curve, "")), ...dots, chart.cursor);
}

function axes(width, x, y) {
  const bottom = HEIGHT - BOTTOM;
  const rows = y.marks.flatMap((value) => [
    makeSvg("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: y.at(value), y2: y.at(value) }),
    makeSvg("text", { x: LEFT - 6, y: y.at(value) + 4, "text-anchor": "end" }, String(Number(value.toPrecision(6)))),
  ]);
  const steps = ticks(0, LAST_STEP, Math.max(2, Math.floor(width / 110))).filter(Number.isInteger);
  const columns = steps.flatMap((step) => [
    makeSvg("line", { class: "grid", x1: x(step), x2: x(step), y1: bottom, y2: bottom + 4 }),
    makeSvg("text", { x: x(step), y: bottom + 16, "text-anchor": "middle" }, String(step)),
  ]);
  return [...rows, ...columns, makeSvg("text", { x: width - RIGHT, y: HEIGHT - 4, "text-anchor": "end" }, "optimizer step")];
}

/** Draw the line at a step in all charts, and the values in the one that is pointed at. null: nowhere. */
function pointAll(here, step) {
  const steps = step === null ? [] : here.steps;
  const at = steps.length ? steps[nearest(steps.map((each) => [each]), step)] : null;
  here.step = at;
  pointed = [here, at];
  for (const chart of charts) point(chart, at, chart === here);
}

function point(chart, step, here) {
  chart.cursor.replaceChildren();
  chart.tip.replaceChildren();
  if (step === null || !chart.curves.length) return;
  const { x, y } = chart.at;
  chart.cursor.append(makeSvg("line", { class: "cursor", x1: x(step), x2: x(step), y1: TOP, y2: HEIGHT - BOTTOM }));
  if (!here) return;
  const values = chart.curves.map(({ run, points }) => ({ run, own: points[nearest(points, step)] }));
  const rows = values.sort((a, b) => b.own[1] - a.own[1]).map(({ run, own: [own, value] }) => {
    chart.cursor.append(makeSvg("circle", { class: `dot ${colour(run)}`, r: 4, cx: x(own), cy: y(value) }));
    const other = own === step ? [] : [make("i", {}, `at ${own}`)]; // its record that is nearest
    return make("div", {}, swatch(run), make("span", {}, names[run]), make("em", {}, short(value)), ...other);
  });
  const mean = chart.panel.smooth && smoothing > 1 ? `, mean of ${smoothing} records` : "";
  chart.tip.replaceChildren(make("b", {}, `step ${step}${mean}`), ...rows);
  const right = x(step) > chart.svg.clientWidth / 2;
  chart.tip.style.top = `${chart.svg.getBoundingClientRect().top - chart.figure.getBoundingClientRect().top + TOP}px`;
  chart.tip.style.left = right ? "auto" : `${x(step) + 24}px`;
  chart.tip.style.right = right ? `${chart.svg.clientWidth - x(step) + 24}px` : "auto";
}

// ---- settings ----

function drawSettings() {
  const rows = content.settings.filter((setting) => byId("equal").checked || names.length === 1 || setting.differs);
  const none = rows.length ? "" : content.settings.length ? "All settings are equal." : "No settings were recorded.";
  const head = make("tr", {}, ...["setting", ...names].map((name) => make("th", { scope: "col" }, name)));
  const lines = rows.map(({ name, values }) =>
    make("tr", {}, make("th", { scope: "row" }, name), ...values.map((text) => make("td", {}, text))));
  byId("settings").replaceChildren(
    ...(none ? [make("caption", {}, none)] : [make("thead", {}, head), make("tbody", {}, ...lines)]));
}

// ---- answers ----

function isExact(row, run) {
  return row.adapted[run] === row.expected;
}

/** The answers under their labels: a base model that all runs share answers once. */
function answersTo(row) {
  const runs = [...shown].sort((a, b) => a - b).filter((run) => row.adapted[run] !== null);
  const bases = new Set(runs.map((run) => row.base[run]));
  const base = bases.size === 1 ? [["base", [...bases][0]]] : runs.map((run) => [`base of ${names[run]}`, row.base[run]]);
  const answer = ([label, text, run]) => {
    const marks = `${run !== undefined && isExact(row, run) ? "exact" : ""} ${text ? "" : "nothing"}`;
    return [make("dt", run === undefined ? {} : { class: colour(run) }, label), make("dd", { class: marks }, text || "nothing")];
  };
  return [["expected", row.expected], ...base, ...runs.map((run) => [names[run], row.adapted[run], run])].flatMap(answer);
}

function drawAnswers() {
  const answered = (row) => [...shown].some((run) => row.adapted[run] !== null);
  const isWrong = (row) => [...shown].some((run) => row.adapted[run] !== null && !isExact(row, run));
  const rows = content.prompts.filter((row) => answered(row) && (!byId("wrong").checked || isWrong(row)));
  const left = content.left_out ? `; ${content.left_out} more are only in answers.jsonl` : "";
  byId("answers-count").textContent = `${Math.min(promptsShown, rows.length)} of ${rows.length} prompts${left}`;
  byId("answers").replaceChildren(...rows.slice(0, promptsShown).map((row) =>
    make("article", {}, make("pre", {}, row.prompt.trim()), make("dl", {}, ...answersTo(row)))));
  byId("more").hidden = rows.length <= promptsShown;
}

// ---- the page ----

function drawAll() {
  drawLegend();
  drawFigures();
  drawCharts();
  drawAnswers();
}

document.title = `Training runs: ${names.join(", ")}`;
for (const panel of PANELS)
  if (content.curves.some((curves) => curves[panel.name])) charts.push(makeChart(panel));
byId("charts").append(...charts.map((chart) => chart.figure));
byId("equal-label").hidden = names.length === 1;
byId("equal").onchange = drawSettings;
byId("answers-section").hidden = !content.prompts.length;
byId("wrong").onchange = drawAnswers;
byId("more").onclick = () => { promptsShown += 20; drawAnswers(); };
drawAll();
drawSettings();
new ResizeObserver(drawCharts).observe(byId("charts"));
