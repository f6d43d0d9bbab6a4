"use strict";
// All numbers were computed in Python; this only draws them. Text enters by textContent alone.

// ---- What all parts of the page use --------------------------------------------------------------
const data = JSON.parse(document.getElementById("data").textContent);
const root = document.documentElement;
const asked = new URLSearchParams(location.hash.slice(1));  // such as #run=2&group=3&p=1&theme=dark
const $ = (id) => document.getElementById(id);

// Append an element to a parent, if there is one, and return it.
function make(tag, parent, text, name) {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  if (name) node.className = name;
  return parent ? parent.appendChild(node) : node;
}

// The same for a part of a drawing.
function svg(tag, parent, attributes, text) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const name in attributes) node.setAttribute(name, attributes[name]);
  if (text !== undefined) node.textContent = text;
  return parent ? parent.appendChild(node) : node;
}

function fixed(x, digits = 2) {
  if (x === null) return "–";
  const text = Math.abs(x).toFixed(digits);
  return x < 0 && +text ? `−${text}` : text;
}

$("title").textContent = data.title;
document.title = `ARCA: ${data.title}`;
for (const [id, text] of [["curves", "Learning curves"], ["credit", "Token credit"]]) {
  make("a", $("parts"), text).setAttribute("href", `#${id}`);
}
if (["light", "dark"].includes(asked.get("theme"))) root.dataset.theme = asked.get("theme");
$("theme").addEventListener("click", () => {
  const system = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  root.dataset.theme = (root.dataset.theme || system) === "dark" ? "light" : "dark";
});
