
// ---- Token credit --------------------------------------------------------------------------------
// A group is the completions of a problem that the run kept at a step. A table has a row for each
// rule, a column for each completion; the inspector shows the numbers of the token pointed at.
const state = { run: 0, group: 0, p: data.p, hidden: new Set(), token: [0, 0, 0] };
let groups = [], rules = [], own = "";  // of the run that is shown
let spans = [];  // [completion][rule][token]

// The colour at a share of a ramp's length, as [r, g, b].
function mix(stops, share) {
  const place = Math.min(share * (stops.length - 1), stops.length - 1.0001);
  const i = Math.floor(place), rest = place - i;
  const part = (hex, k) => parseInt(hex.slice(1 + 2 * k, 3 + 2 * k), 16);
  return [0, 1, 2].map((k) => Math.round(part(stops[i], k) * (1 - rest) + part(stops[i + 1], k) * rest));
}

// Black or white, whichever stands out more: the luminance of WCAG.
function inkOn(rgb) {
  const [r, g, b] = rgb.map((v) => v / 255 <= .04045 ? v / 255 / 12.92 : ((v / 255 + .055) / 1.055) ** 2.4);
  return .2126 * r + .7152 * g + .0722 * b > .179 ? "#000" : "#fff";
}

function paint(node, share, light = data.light, dark = data.dark) {
  const pair = [mix(light, share), mix(dark, share)];
  const both = (f) => `light-dark(${f(pair[0])}, ${f(pair[1])})`;
  node.style.background = both((rgb) => `rgb(${rgb})`);
  node.style.color = both(inkOn);
}

const shade = (w) => Math.min(1, Math.log1p(Math.max(0, w)) / Math.log1p(data.top));
const isRight = (c) => c.reward === 1;
const between = (c) => c.reward > 0 ? `reward ${c.reward.toFixed(2)}` : "✗ wrong";
const verdict = (c) => isRight(c) ? "✓ right" : between(c);

// ---- What is chosen ----
function drawRamp() {
  const stops = data.light.map((colour, i) => `light-dark(${colour}, ${data.dark[i]})`);
  document.querySelector(".ramp i").style.background = `linear-gradient(to right, ${stops})`;
  ["0", "1", "3", "7", `${data.top}+`].forEach((text) => make("b", $("ticks"), text));
}

// Which completions are side by side: at first the best and the worst.
function drawColumns() {
  const all = groups[state.group].completions, rewards = all.map((c) => c.reward);
  const ends = [Math.max(...rewards), Math.min(...rewards)];
  const shown = ends[0] > ends[1] ? ends.map((x) => rewards.indexOf(x)) : [0, 1];
  state.hidden = new Set([...all.keys()].filter((i) => !shown.includes(i)));
  $("columns").querySelectorAll("label").forEach((node) => node.remove());
  all.forEach((c, i) => {
    const label = make("label", $("columns")), box = make("input", label);
    box.type = "checkbox";
    box.checked = !state.hidden.has(i);
    label.append(` ${i + 1} ${verdict(c)}`);
    box.addEventListener("change", () => {
      if (box.checked) state.hidden.delete(i);
      else state.hidden.add(i);
      drawRules();
    });
  });
}

// ---- The table of rules ----
function drawHead(shown) {
  const head = $("rules").tHead, completions = groups[state.group].completions;
  head.replaceChildren();
  const top = make("tr", head);
  make("th", top, "Rule").scope = "col";
  for (const i of shown) {
    const c = completions[i], th = make("th", top);
    th.scope = "col";
    make("span", th, verdict(c), `side ${isRight(c) ? "is-right" : "is-wrong"}`);
    const advantage = `${c.advantage > 0 ? "+" : ""}${fixed(c.advantage)}`;
    make("small", th, `completion ${i + 1}, advantage ${advantage}, ${c.tokens.length} tokens`);
  }
}

// The tokens of completion i, shaded by what rule r pays them.
function drawCell(row, i, r) {
  const c = groups[state.group].completions[i], weights = c.weights[state.p - 1][r];
  const cell = make("td", row), strip = make("p", cell, undefined, "tokens");
  cell.dataset.side = `${i + 1} ${verdict(c)}`;
  strip.setAttribute("role", "group");
  strip.setAttribute("aria-label", `completion ${i + 1} under ${rules[r].name}`);
  c.tokens.forEach((token, t) => {
    const span = make("span", strip, token);
    paint(span, shade(weights[t]));
    span.tabIndex = -1;
    span.dataset.at = `${i} ${r} ${t}`;
    spans[i][r].push(span);
    make("wbr", strip);
  });
  const gini = fixed(c.gini[state.p - 1][r]), ratio = fixed(c.ratio[state.p - 1][r]);
  make("p", cell, `Gini ${gini}, effective-token ratio ${ratio}`, "concentration number");
}

function drawRules() {
  const completions = groups[state.group].completions, body = $("rules").tBodies[0];
  const shown = [...completions.keys()].filter((i) => !state.hidden.has(i));
  spans = completions.map(() => rules.map(() => []));
  drawHead(shown);
  body.replaceChildren();
  rules.forEach((rule, r) => {
    const row = make("tr", body, undefined, rule.name === own ? "own" : "");
    const th = make("th", row, rule.name);
    th.scope = "row";
    make("small", th, rule.formula);
    for (const i of shown) drawCell(row, i, r);
  });
  if (!shown.length) return;
  // At first, look at the token that the run's own rule pays most.
  const r = Math.max(0, rules.findIndex((rule) => rule.name === (own || "arca")));
  const weights = completions[shown[0]].weights[state.p - 1][r];
  inspect(shown[0], r, Math.max(0, weights.indexOf(Math.max(...weights))));
}

// Show the numbers of token t of completion i under rule r, and mark it under all rules.
function inspect(i, r, t) {
  const [oldI, oldR, oldT] = state.token, c = groups[state.group].completions[i];
  const under = (list, token) => (list || []).map((row) => row[token]).filter(Boolean);
  under(spans[oldI], oldT).forEach((node) => { node.classList.remove("on"); node.tabIndex = -1; });
  under(spans[i], t).forEach((node) => node.classList.add("on"));
  spans[i][r][t].tabIndex = 0;
  state.token = [i, r, t];
  $("token").replaceChildren();
  make("span", $("token"), c.tokens[t]);
  const chance = 100 * Math.exp(c.logp[t]);
  const odds = chance < 1 ? "under 1 %" : `${chance.toFixed(0)} %`;
  const facts = [`token ${t + 1} of ${c.tokens.length}, completion ${i + 1} (${verdict(c)})`,
    `log-prob ${fixed(c.logp[t], 3)} (${odds}), entropy ${fixed(c.entropy[t], 3)} nats`,
    `residual ${fixed(c.residual[t], 3)}, advantage ${fixed(c.advantage)}`];
  $("facts").replaceChildren();
  facts.forEach((text) => make("div", $("facts"), text));
  $("weights").replaceChildren();
  rules.forEach((rule, k) => {
    const cell = make("div", $("weights")), w = c.weights[state.p - 1][k][t];
    make("dt", cell, rule.name);
    make("dd", cell, fixed(w));
    paint(cell, shade(w));
  });
}

// ---- Statistics of the group ----
function drawDiagnostics() {
  const g = groups[state.group], p = state.p - 1, table = $("diagnostics"), several = groups.length > 1;
  table.caption.textContent = `Mean over the ${g.completions.length} completions of this problem that the run kept, `
    + `sharpening ${state.p}. By class: the share of a completion’s credit (for uniform, of its tokens).`;
  table.tHead.replaceChildren();
  table.tBodies[0].replaceChildren();
  const heads = ["rule", "Gini", ...(several ? ["Gini by step"] : []), "effective-token ratio", ...data.classes];
  const top = make("tr", table.tHead);
  heads.forEach((text) => { make("th", top, text).scope = "col"; });
  rules.forEach((rule, r) => {
    const row = make("tr", table.tBodies[0]);
    make("th", row, rule.name).scope = "row";
    make("td", row, fixed(g.gini[p][r]));
    if (several) make("td", row).append(spark(groups.map((x) => x.gini[p][r])));
    make("td", row, fixed(g.ratio[p][r]));
    g.classes[p][r].forEach((x) => make("td", row, x === null ? "–" : `${(100 * x).toFixed(1)} %`));
  });
}

// Gini, from 0 at the bottom to 1, with a dot at the step that is shown.
function spark(values) {
  const x = (i) => 4 + 112 * i / (values.length - 1), y = (v) => 24 - 20 * v;
  const about = `Gini from ${fixed(values[0])} to ${fixed(values.at(-1))}`;
  const box = svg("svg", null, { width: 120, height: 28, role: "img", "aria-label": about });
  svg("line", box, { x1: 4, x2: 116, y1: 24.5, y2: 24.5 });
  svg("polyline", box, { class: "spark", points: values.map((v, i) => `${x(i)},${y(v)}`).join(" ") });
  svg("circle", box, { class: "spark", cx: x(state.group), cy: y(values[state.group]), r: 3 });
  return box;
}

function drawCorrelation() {
  const table = $("correlation"), matrix = groups[state.group].correlation[state.p - 1];
  table.tHead.replaceChildren();
  table.tBodies[0].replaceChildren();
  const top = make("tr", table.tHead);
  make("th", top, "");
  rules.forEach((rule) => { make("th", top, rule.name).scope = "col"; });
  rules.forEach((rule, a) => {
    const row = make("tr", table.tBodies[0]);
    make("th", row, rule.name).scope = "row";
    rules.forEach((other, b) => {
      const rho = matrix[a][b], cell = make("td", row, fixed(rho));
      cell.title = `${rule.name} and ${other.name}`;
      if (rho >= 0) paint(cell, .75 * rho);
      else paint(cell, -.75 * rho, ["#ffffff", "#e08a3c"], ["#191c20", "#c06a20"]);
    });
  });
}

// ---- All of it ----
function drawGroup() {
  const g = groups[state.group];
  $("group").value = $("step").value = state.group;
  $("now").textContent = g.step;
  document.querySelectorAll("[name=p]").forEach((node) => { node.checked = +node.value === state.p; });
  $("problem").textContent = g.problem;
  document.querySelector("#gold b").textContent = g.gold;
  drawRules();
  drawDiagnostics();
  drawCorrelation();
}

function goToGroup(group) {
  state.group = group;
  drawColumns();
  drawGroup();
}

function goToRun(run) {
  state.run = run;
  ({ groups, rules, own } = data.credits[run]);
  $("run").value = run;
  $("group").replaceChildren();
  groups.forEach((g, i) => { make("option", $("group"), g.title).value = i; });
  $("slide").hidden = groups.length < 2;
  $("step").max = groups.length - 1;
  goToGroup(groups.length - 1);
}

// ---- Mouse and keyboard ----
for (const kind of ["mouseover", "focusin", "click"]) {
  $("rules").addEventListener(kind, (event) => {
    if (event.target.dataset.at) inspect(...event.target.dataset.at.split(" ").map(Number));
  });
}

$("rules").addEventListener("keydown", (event) => {
  if (!event.target.dataset.at) return;
  let [i, r, t] = event.target.dataset.at.split(" ").map(Number);
  const shown = [...spans.keys()].filter((k) => spans[k][0].length);
  const beside = (by) => shown[shown.indexOf(i) + by];
  if (event.key === "ArrowRight") t += 1;
  else if (event.key === "ArrowLeft") t -= 1;
  else if (event.key === "ArrowDown") r += 1;
  else if (event.key === "ArrowUp") r -= 1;
  else if (event.key === "Home") t = 0;
  else if (event.key === "End") t = spans[i][r].length - 1;
  else return;
  event.preventDefault();
  // Beyond the first and the last token is the completion beside this one.
  if (t >= spans[i][0].length && beside(1) !== undefined) { i = beside(1); t = 0; }
  if (t < 0 && beside(-1) !== undefined) { i = beside(-1); t = spans[i][0].length - 1; }
  if (spans[i][r] && spans[i][r][t]) spans[i][r][t].focus();
});

$("controls").addEventListener("submit", (event) => event.preventDefault());
$("run").addEventListener("change", () => goToRun(+$("run").value));
$("group").addEventListener("change", () => goToGroup(+$("group").value));
$("step").addEventListener("input", () => goToGroup(+$("step").value));
document.querySelectorAll("[name=p]").forEach((node) => {
  node.addEventListener("change", () => { state.p = +node.value; drawGroup(); });
});

$("none").hidden = data.credits.length > 0;
$("kept").hidden = !data.credits.length;
if (data.credits.length) {
  drawRamp();
  data.credits.forEach(({ run, own }, i) => {
    make("option", $("run"), own ? `${run}, trained with ${own}` : run).value = i;
  });
  if (["1", "2"].includes(asked.get("p"))) state.p = +asked.get("p");
  goToRun(data.credits[+asked.get("run") - 1] ? +asked.get("run") - 1 : 0);
  if (groups[+asked.get("group") - 1]) goToGroup(+asked.get("group") - 1);
}
root.dataset.ready = "yes";
