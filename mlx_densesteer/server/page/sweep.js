/** A sweep's results as a grid of layers and doses. */

import { element, fill, make } from "/page/dom.js";
import { amount, brief, count, percent, where } from "/page/words.js";

const SVG = "http://www.w3.org/2000/svg";
const [CELL, HEIGHT, LEFT, TOP] = [50, 30, 52, 20];

/** The sweep of a vector, whose cells set the dial. */
export class Sweep {
  /** @param {(setting: object) => void} use */
  constructor(use) {
    this.use = use;
    this.vector = null;
    this.cells = [];
  }

  /** Show the vector's sweep, if it has one, and mark the dial's setting in it. */
  show(vector, setting) {
    if (vector !== this.vector) {
      this.vector = vector;
      this.group();
    }
    for (const { row, group } of this.cells) {
      const here = rounded(row.strength) === rounded(setting.strength) &&
        joined(row.layers) === joined(setting.layers) && (row.positions ?? "all") === setting.positions;
      group.setAttribute("aria-pressed", String(here));
    }
  }

  /** Group the rows by their problems; a row without layers is the unsteered model's. */
  group() {
    const groups = new Map();
    for (const row of this.vector?.tested ?? []) {
      const name = taskName(row);
      groups.set(name, [...(groups.get(name) ?? []), row]);
    }
    for (const [name, rows] of groups) if (rows.every(unsteered)) groups.delete(name);
    this.cells = [];
    element("sweep").hidden = !groups.size;
    if (!groups.size) return;
    const select = element("sweep-task");
    fill(select, groups.keys());
    select.onchange = () => this.draw(groups.get(select.value));
    select.onchange();
  }

  draw(all) {
    const stock = this.stock(all);
    const rows = all.filter((row) => !unsteered(row));
    const { unit, columnOf, write } = columnsOf(rows);
    const [layers, columns] = [setsOf(rows), sorted(rows.map(columnOf))];
    const [width, height] = [LEFT + CELL * columns.length, TOP + HEIGHT * layers.length];
    const svg = node("svg", { width, height, role: "group", "aria-label": `Accuracy by layer and ${unit}` });
    columns.forEach((column, x) => svg.append(label(write(column), LEFT + CELL * (x + 0.5), TOP - 6, "middle")));
    layers.forEach((name, y) => svg.append(label(`layer ${name}`, LEFT - 6, TOP + HEIGHT * (y + 0.62), "end")));
    const found = rows.map((row) => row.accuracy ?? 0);
    const [least, most] = [Math.min(...found), Math.max(...found)];
    this.cells = rows.map((row) => {
      const share = most > least ? ((row.accuracy ?? 0) - least) / (most - least) : 0;
      const group = this.cell(row, LEFT + CELL * columns.indexOf(columnOf(row)), TOP + HEIGHT * layers.indexOf(joined(row.layers)), share);
      svg.append(group);
      return { row, group };
    });
    element("sweep-picture").replaceChildren(svg);
    element("sweep-detail").textContent = `${stock ? `Unsteered: ${whole(stock.accuracy)}. ` : ""}Choose a cell to set the dial.`;
    element("sweep-table").replaceChildren(table(stock ? [stock, ...rows] : rows));
  }

  /** The unsteered row of these problems, or one that names no problems. */
  stock(rows) {
    return rows.find(unsteered) ?? this.vector.tested.find((row) => unsteered(row) && !row.problems);
  }

  cell(row, x, y, share) {
    const told = tell(row);
    const group = node("g", { tabindex: 0, role: "button", "aria-label": told });
    const rect = node("rect", { x: x + 1, y: y + 1, width: CELL - 2, height: HEIGHT - 2, rx: 5 });
    rect.style.fill = `color-mix(in srgb, var(--accent) ${Math.round(5 + 40 * share)}%, var(--card))`;
    group.append(rect, label(whole(row.accuracy), x + CELL / 2, y + HEIGHT * 0.63, "middle"));
    const detail = () => { element("sweep-detail").textContent = told; };
    const use = () =>
      this.use({ vector: this.vector.name, strength: row.strength, layers: row.layers, positions: row.positions ?? "all" });
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
}

const unsteered = (row) => !Array.isArray(row.layers);

/** The layers of a setting that are steered together: "8+12+16". */
const joined = (layers) => layers.join("+");

/** The names of the rows' layers, by number. */
const setsOf = (rows) =>
  [...new Map(rows.map((row) => [joined(row.layers), row.layers]))]
    .sort(([, a], [, b]) => a[0] - b[0] || a.length - b.length).map(([name]) => name);

/** Name the problems of a row: "gsm8k train, 300 problems". */
function taskName(row) {
  const { task, split } = typeof row.task === "object" && row.task ? row.task : { task: row.task };
  const name = [task, split].filter(Boolean).join(" ") || "problems";
  return `${name}${row.problems ? `, ${count(row.problems, "problem")}` : ""}${where(row.positions)}`;
}

/** What the columns are: doses, or strengths where that takes fewer columns or doses are missing. */
function columnsOf(rows) {
  const doseOf = (row) => rounded(row.dose);
  const strengthOf = (row) => row.strength;
  const known = rows.every((row) => typeof row.dose === "number");
  if (!known || new Set(rows.map(doseOf)).size > new Set(rows.map(strengthOf)).size)
    return { unit: "strength", columnOf: strengthOf, write: brief };
  return { unit: "dose", columnOf: doseOf, write: percent };
}

function tell(row) {
  return `Layer ${joined(row.layers)}, ${amount(row.strength, row.dose)}: accuracy ${whole(row.accuracy)}, ` +
    `${shown(row.tokens)} tokens, ${shown(row.steps)} steps, density ${shown(row.density)}`;
}

function table(rows) {
  const names = ["layers", "dose", "strength", "accuracy", "tokens", "steps", "density"];
  const head = make("tr", {}, ...names.map((name) => make("th", { textContent: name, scope: "col" })));
  const writers = {
    layers: (layers) => (layers ? joined(layers) : "-"),
    accuracy: whole,
    dose: (dose) => (typeof dose === "number" ? percent(dose) : "-"),
  };
  const body = rows.map((row) => make("tr", {}, ...names.map((name) =>
    make("td", { textContent: (writers[name] ?? shown)(row[name]) }))));
  return make("table", {}, make("thead", {}, head), make("tbody", {}, ...body));
}

/** Drop rounding errors, so that equal settings compare equal. */
const rounded = (number) => Number(number.toPrecision(6));
const sorted = (values) => [...new Set(values)].sort((a, b) => a - b);
const whole = (share) => (typeof share === "number" ? `${Math.round(100 * share)}\u00a0%` : "-");
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
