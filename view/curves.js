
// ---- Learning curves -----------------------------------------------------------------------------
// A line is a run, or the mean of several that differ only in their seed. A panel draws one number of
// all lines by step. The reader points at a step of a panel, and the legend shows the values there.
const { lines, panels, choices, every, table } = data.curves;
const BOX = { width: 360, height: 190, left: 46, right: 12, top: 8, bottom: 24 };
const DASHES = ["", "9 4", "3 3", "10 3 3 3", "1 4"];  // then the same again, thicker
const off = new Set();  // lines that the reader has switched off
const at = { choice: 0, panel: 0, step: null };
let marks = [];  // of each panel, what follows the step that is pointed at

const listed = () => choices[at.choice].lines;
const drawn = () => listed().filter((i) => !off.has(i));

// The steps, in order, at which some line of a panel has a value.
function stepsOf(panel) {
  const steps = new Set();
  for (const i of drawn()) {
    const curve = lines[i].curves[panel.key] || { x: [], mean: [] };
    curve.x.forEach((x, k) => { if (curve.mean[k] !== null) steps.add(x); });
  }
  return [...steps].sort((a, b) => a - b);
}

// The last step of all panels and lines, so that all panels have the same axis.
function lastStep() {
  const curves = listed().flatMap((i) => Object.values(lines[i].curves));
  return curves.reduce((last, curve) => Math.max(last, curve.x.at(-1) || 0), 1);
}

// Round numbers from 0 to an end, about `count` of them.
function ticks(end, count) {
  const ten = 10 ** Math.floor(Math.log10(end / count));
  const step = [1, 2, 5, 10].map((m) => m * ten).find((size) => end / size <= count);
  const found = [];
  for (let i = 0; i * step <= end * 1.0001; i++) found.push(i * step);
  return found;
}

function short(x) {
  if (x === null) return "–";
  return Math.abs(x) >= 1000 ? Math.round(x).toLocaleString("en") : String(+x.toPrecision(3));
}

// The place of the value nearest to a step, -1 if the line has none there.
function placeOf(curve, step) {
  let best = -1;
  (curve ? curve.x : []).forEach((x, k) => {
    const near = best < 0 || Math.abs(x - step) < Math.abs(curve.x[best] - step);
    if (near && Math.abs(x - step) <= every / 2) best = k;
  });
  return best >= 0 && curve.mean[best] !== null ? best : -1;
}

// Such as 0.81 [0.76, 0.85].
function valueAt(curve, step) {
  const k = placeOf(curve, step);
  if (k < 0) return "–";
  const band = curve.low[k] === null ? "" : ` [${short(curve.low[k])}, ${short(curve.high[k])}]`;
  return short(curve.mean[k]) + band;
}

// Give a drawing the colour, dashes and thickness of a line.
function wear(node, line) {
  node.style.setProperty("--c", `light-dark(${line.colour[0]}, ${line.colour[1]})`);
  node.setAttribute("stroke-dasharray", DASHES[line.style % DASHES.length]);
  node.setAttribute("stroke-width", 1.8 + 1.2 * Math.floor(line.style / DASHES.length));
}

// The stretches of a curve between its gaps, as lists of places.
function stretches(curve) {
  const found = [[]];
  curve.mean.forEach((value, k) => {
    if (value !== null) found.at(-1).push(k);
    else if (found.at(-1).length) found.push([]);
  });
  return found.filter((places) => places.length);
}

// Draw a line into a panel: band and curve or, where a value stands alone, a whisker and a dot.
function drawCurve(parent, line, curve, x, y) {
  const group = svg("g", parent, { "data-line": line.label });
  const few = curve.x.length <= 20;
  wear(group, line);
  for (const places of stretches(curve)) {
    const points = (name, list) => list.map((k) => `${x(curve.x[k])},${y(curve[name][k])}`);
    const banded = places.filter((k) => curve.low[k] !== null);
    const outline = [...points("high", banded), ...points("low", [...banded].reverse())];
    if (banded.length > 1) svg("polygon", group, { class: "band", points: outline.join(" ") });
    if (places.length > 1) svg("polyline", group, { class: "curve", points: points("mean", places).join(" ") });
    for (const k of few || places.length === 1 ? places : []) {
      const here = x(curve.x[k]), ends = { y1: y(curve.low[k]), y2: y(curve.high[k]) };
      if (banded.length === 1) svg("line", group, { class: "whisker", x1: here, x2: here, ...ends });
      svg("circle", group, { class: "dot", cx: here, cy: y(curve.mean[k]), r: 2.4 });
    }
  }
}

// Draw the axes of a panel: round numbers, and thin lines at those of the upright one.
function drawAxes(box, end, top, x, y) {
  for (const value of ticks(top, 5)) {
    svg("line", box, { x1: BOX.left, x2: BOX.width - BOX.right, y1: y(value), y2: y(value) });
    svg("text", box, { x: BOX.left - 6, y: y(value) + 4, "text-anchor": "end" }, short(value));
  }
  for (const value of ticks(end, 5).filter(Number.isInteger)) {
    svg("text", box, { x: x(value), y: BOX.height - 6, "text-anchor": "middle" }, short(value));
  }
}

function drawPanel(panel, number, end) {
  // 1) The scales.
  const x = (step) => +(BOX.left + (BOX.width - BOX.left - BOX.right) * step / end).toFixed(2);
  const y = (value) => +(BOX.height - BOX.bottom - (BOX.height - BOX.top - BOX.bottom) * Math.min(value / panel.top, 1)).toFixed(2);
  // 2) The drawing.
  const figure = make("figure", $("panels"), undefined, "panel");
  make("figcaption", figure, panel.title);
  const box = svg("svg", figure, { class: "chart", viewBox: `0 0 ${BOX.width} ${BOX.height}`, "data-key": panel.key });
  drawAxes(box, end, panel.top, x, y);
  for (const i of drawn()) {
    if (lines[i].curves[panel.key]) drawCurve(box, lines[i], lines[i].curves[panel.key], x, y);
  }
  const steps = stepsOf(panel);
  if (!steps.length) {
    svg("text", box, { x: BOX.width / 2, y: 90, "text-anchor": "middle" }, "nothing yet");
    return;
  }
  // 3) What follows the step that is pointed at, with the keyboard or by a pointer.
  const mark = svg("line", box, { class: "mark", y1: BOX.top, y2: BOX.height - BOX.bottom });
  marks[number] = { box, mark, x, steps };
  const about = { tabindex: 0, role: "slider", "aria-label": `${panel.title}, by step` };
  about["aria-valuemin"] = steps[0];
  about["aria-valuemax"] = steps.at(-1);
  for (const name in about) box.setAttribute(name, about[name]);
  box.addEventListener("keydown", (event) => onKey(event, number));
  box.addEventListener("focus", () => point(number, at.step));
  box.addEventListener("pointermove", (event) => {
    const place = box.getBoundingClientRect();
    const share = ((event.clientX - place.left) / place.width * BOX.width - BOX.left) / (x(end) - BOX.left);
    point(number, share * end);
  });
}

// Point at the step of a panel that is nearest to this one.
function point(number, step) {
  const steps = marks[number].steps;
  const distance = (other) => Math.abs(other - step);
  at.panel = number;
  at.step = steps.reduce((best, other) => distance(other) < distance(best) ? other : best);
  // Each panel's mark, and the legend's values.
  for (const { mark, x } of marks.filter(Boolean)) {
    mark.setAttribute("x1", x(at.step));
    mark.setAttribute("x2", x(at.step));
  }
  const panel = panels[number], words = [];
  $("pointed").textContent = `${panel.title} at step ${at.step}`;
  listed().forEach((i, place) => {
    const value = off.has(i) ? "" : valueAt(lines[i].curves[panel.key], at.step);
    $("legend").children[place].querySelector("output").textContent = value;
    if (value) words.push(`${lines[i].label} ${value}`);
  });
  marks[number].box.setAttribute("aria-valuenow", at.step);
  marks[number].box.setAttribute("aria-valuetext", `step ${at.step}: ${words.join("; ")}`);
}

function onKey(event, number) {
  const steps = marks[number].steps, here = steps.indexOf(at.step);
  const to = { ArrowRight: here + 1, ArrowUp: here + 1, ArrowLeft: here - 1, ArrowDown: here - 1,
    PageUp: here + 10, PageDown: here - 10, Home: 0, End: steps.length - 1 }[event.key];
  if (to === undefined) return;
  event.preventDefault();
  point(number, steps[Math.max(0, Math.min(steps.length - 1, to))]);
}

function drawLegend() {
  $("legend").replaceChildren();
  for (const i of listed()) {
    const button = make("button", $("legend")), line = lines[i];
    button.type = "button";
    button.setAttribute("aria-pressed", !off.has(i));
    const swatch = svg("svg", button, { width: 34, height: 12, "aria-hidden": "true" });
    wear(svg("line", swatch, { class: "curve", x1: 1, x2: 33, y1: 6, y2: 6, style: "stroke: var(--c)" }), line);
    make("span", button, line.label + (line.seeds > 1 ? ` (${line.seeds} runs)` : ""));
    make("output", button, "", "number");
    button.addEventListener("click", () => {
      if (!off.delete(i)) off.add(i);
      button.setAttribute("aria-pressed", !off.has(i));
      drawPanels();
    });
  }
}

function drawPanels() {
  const end = lastStep();
  $("panels").replaceChildren();
  marks = [];
  panels.forEach((panel, number) => drawPanel(panel, number, end));
  const first = marks[at.panel] ? at.panel : marks.findIndex(Boolean);
  $("pointed").textContent = "";
  if (first >= 0) point(first, at.step === null ? end : at.step);
}

function drawTable() {
  const heads = [...new Set(table.flatMap(Object.keys))], top = make("tr", $("table").tHead);
  heads.forEach((text) => { make("th", top, text).scope = "col"; });
  for (const row of table) {
    const cells = make("tr", $("table").tBodies[0]);
    heads.forEach((name) => make(name === "run" ? "th" : "td", cells, row[name] ?? "–"));
  }
}

$("every").textContent = every > 1 ? `A point by step is the mean of ${every} steps.` : "";
$("choose").hidden = choices.length < 2;
choices.forEach((choice, i) => { make("option", $("choice"), choice.name).value = i; });
$("choice").addEventListener("change", () => {
  at.choice = +$("choice").value;
  drawLegend();
  drawPanels();
});
drawLegend();
drawPanels();
drawTable();
