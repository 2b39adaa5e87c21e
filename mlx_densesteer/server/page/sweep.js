/** What a sweep found, as a picture of layers and strengths. */

import { brief } from "/page/steps.js";
import { make } from "/page/transcript.js";

const element = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
const [CELL, HEIGHT, LEFT, TOP] = [54, 30, 46, 20];

/** Show the sweep of a vector if it has one; a cell that is chosen goes to `use`. */
export function showSweep(vector, use) {
  const groups = new Map();
  for (const row of vector?.tested ?? []) {
    if (row.layer === null || row.layer === undefined) continue; // the unsteered row
    const name = taskName(row);
    groups.set(name, [...(groups.get(name) ?? []), row]);
  }
  element("sweep").hidden = !groups.size;
  if (!groups.size) return;
  const select = element("sweep-task");
  select.replaceChildren(...[...groups.keys()].map((name) => make("option", { value: name, textContent: name })));
  select.onchange = () => draw(groups.get(select.value), vector, use);
  select.onchange();
}

function taskName(row) {
  const task = typeof row.task === "object" && row.task ? row.task.name ?? JSON.stringify(row.task) : row.task;
  return `${task ?? "problems"}${row.problems ? `, ${row.problems}` : ""}, ${row.positions ?? "all"}`;
}

function draw(rows, vector, use) {
  const layers = sorted(rows.map((row) => row.layer));
  const strengths = sorted(rows.map((row) => row.strength));
  const width = LEFT + CELL * strengths.length;
  const svg = node("svg", { viewBox: `0 0 ${width} ${TOP + HEIGHT * layers.length}`, role: "group",
    "aria-label": "Accuracy by layer and strength" });
  strengths.forEach((strength, x) => svg.append(label(brief(strength), LEFT + CELL * (x + 0.5), TOP - 6, "middle")));
  layers.forEach((layer, y) => svg.append(label(`layer ${layer}`, LEFT - 4, TOP + HEIGHT * (y + 0.6), "end")));
  for (const row of rows) {
    const x = LEFT + CELL * strengths.indexOf(row.strength);
    svg.append(cell(row, x, TOP + HEIGHT * layers.indexOf(row.layer), () =>
      use({ vector: vector.name, strength: row.strength, layers: [row.layer], positions: row.positions ?? "all" })));
  }
  element("sweep-picture").replaceChildren(svg);
  element("sweep-detail").textContent = "Choose a cell to set the dial.";
  element("sweep-table").replaceChildren(table(rows));
}

function cell(row, x, y, use) {
  const told = tell(row);
  const group = node("g", { tabindex: 0, role: "button", "aria-label": told });
  const rect = node("rect", { x, y, width: CELL, height: HEIGHT, rx: 5 });
  const share = row.accuracy ?? 0;
  rect.style.fill = `color-mix(in srgb, var(--accent) ${Math.round(8 + 37 * share)}%, var(--card))`;
  group.append(rect, label(percent(row.accuracy), x + CELL / 2, y + HEIGHT * 0.62, "middle"));
  const detail = () => { element("sweep-detail").textContent = told; };
  group.onmouseenter = detail;
  group.onfocus = detail;
  group.onclick = use;
  group.onkeydown = (event) => {
    if (event.key !== "Enter" && event.key !== " ") return;
    event.preventDefault();
    use();
  };
  return group;
}

function tell(row) {
  return `Layer ${row.layer}, strength ${brief(row.strength)}: accuracy ${percent(row.accuracy)}, ` +
    `${shown(row.tokens)} tokens, ${shown(row.steps)} steps, density ${shown(row.density)}`;
}

function table(rows) {
  const names = ["layer", "strength", "accuracy", "tokens", "steps", "density"];
  const head = make("tr", {}, ...names.map((name) => make("th", { textContent: name, scope: "col" })));
  const body = rows.map((row) => make("tr", {}, ...names.map((name) =>
    make("td", { textContent: name === "accuracy" ? percent(row.accuracy) : shown(row[name]) }))));
  return make("table", {}, make("thead", {}, head), make("tbody", {}, ...body));
}

const sorted = (values) => [...new Set(values)].sort((a, b) => a - b);
const percent = (share) => (typeof share === "number" ? `${Math.round(100 * share)}%` : "-");
const shown = (value) => (typeof value === "number" ? brief(value) : "-");

function label(text, x, y, anchor) {
  const made = node("text", { x, y, "text-anchor": anchor });
  made.textContent = text;
  return made;
}

function node(tag, attributes) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}
