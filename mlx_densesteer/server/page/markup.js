/**
 * Format the model's text: headings, lists, tables, code, bold text, simple formulas.
 *
 * Only elements and text nodes are made, so the model's text never becomes HTML. Other markup is shown as
 * it is; links and pictures are text.
 */

import { copyButton, make } from "/page/dom.js";

const FENCE = /^\s*(`{3,}(?=[^`]*$)|~{3,})\s*(\S*)/;
const HEADING = /^\s*#{1,6}\s+(.*)$/s;
const FINAL = /^####\s*([-−]?\s?[$€£¥₹]?\s?\d[\d.,]*(?:(?<!\.)\s?[%\p{L}]+)?)\s*$/u; // GSM8K's mark before the final answer
const ITEM = /^(\s*)(?:([-*+])|(\d{1,9})[.)])\s+(.*)$/s;
const RULE = /^\s*(?:(?:-\s*){3,}|(?:\*\s*){3,}|(?:_\s*){3,})$/;
const BORDERS = /^\||(?<!\\)\|$/g; // of a trimmed line, as ALIGNS is
const ALIGNS = /^\|?\s*:?-+:?\s*(?:\|\s*:?-+:?\s*)*\|?$/;
const DEEPEST = 6; // lists in lists
const BRACES = String.raw`\{((?:[^{}]|\{[^{}]*\})*)\}`;
const BOXED = new RegExp(String.raw`\\boxed${BRACES}`);
const INLINE = new RegExp(
  String.raw`(${"`"}[^${"`"}\n]+${"`"}|\*\*[^*\n]+\*\*|\\\(.+?\\\)|\\\[.+?\\\]|\\boxed${BRACES.replace("((", "(?:(")})`,
);
const SYMBOLS = {
  times: "×", cdot: "·", div: "÷", pm: "±", leq: "≤", le: "≤", geq: "≥", ge: "≥", neq: "≠", ne: "≠", approx: "≈",
  rightarrow: "→", to: "→", implies: "⇒", Rightarrow: "⇒", infty: "∞", pi: "π", degree: "°", circ: "°", dots: "…",
  ldots: "…", quad: " ", left: "", right: "", displaystyle: "",
};

/**
 * Cut a text into blocks.
 * @param {string} text
 * @param {boolean} ends the answer ends with it: GSM8K's mark in the last line is shown as the answer
 * @returns {{source: string, make: () => HTMLElement}[]} equal sources are equal blocks
 */
export function blocks(text, ends = false, depth = 0) {
  const lines = text.split("\n");
  const found = [];
  let at = 0;
  /** Add the block that ends before line `end`. */
  const add = (end, build, kind = "") => {
    found.push({ source: kind + lines.slice(at, end).join("\n"), make: build });
    at = end;
  };
  while (at < lines.length) {
    const line = lines[at];
    const next = lines[at + 1];
    if (!line.trim()) at += 1;
    else if (FENCE.test(line)) addCode(lines, at, add);
    else if (line.trim() === "\\[" || line.trim() === "$$") addFormula(lines, at, add);
    else if (line.includes("|") && isAligns(next) && cells(line).length === cells(next).length)
      addTable(lines, at, add);
    else if (RULE.test(line)) add(at + 1, () => make("hr"));
    else if (ends && at === lines.length - 1 && FINAL.test(line)) add(at + 1, () => final(line.match(FINAL)[1]), "final:");
    else if (HEADING.test(line)) add(at + 1, () => make("p", {}, make("strong", {}, ...inline(line.match(HEADING)[1]))));
    else if (ITEM.test(line) && depth < DEEPEST) addList(lines, at, add, depth);
    else addParagraph(lines, at, add, depth);
  }
  return found;
}

function addCode(lines, at, add) {
  const [, fence, language] = lines[at].match(FENCE);
  const closes = (line) => line.trim().length >= fence.length && !line.trim().replaceAll(fence[0], "");
  let end = at + 1;
  while (end < lines.length && !closes(lines[end])) end += 1;
  const code = lines.slice(at + 1, end).join("\n");
  add(Math.min(end + 1, lines.length), () => {
    const bar = make("div", { className: "bar" }, make("span", { textContent: language || "code" }), copyButton(() => code, "Copy code"));
    const block = make("pre", { tabIndex: 0 }, make("code", { className: "block", textContent: code }));
    block.setAttribute("aria-label", language ? `Code, ${language}` : "Code");
    block.setAttribute("role", "region");
    return make("div", { className: "code" }, bar, block);
  });
}

function addFormula(lines, at, add) {
  const close = lines[at].trim() === "$$" ? "$$" : "\\]";
  let end = at + 1;
  while (end < lines.length && lines[end].trim() !== close) end += 1;
  const inside = lines.slice(at + 1, end).filter((line) => line.trim());
  add(Math.min(end + 1, lines.length), () =>
    make("p", {}, ...inside.flatMap((line, index) => [...(index ? ["\n"] : []), ...math(line.trim())])));
}

function addTable(lines, at, add) {
  let end = at + 2;
  while (end < lines.length && lines[end].includes("|")) end += 1;
  const [head, , ...rows] = lines.slice(at, end).map(cells);
  const aligns = cells(lines[at + 1]).map((one) => (one.endsWith(":") ? (one.startsWith(":") ? "center" : "right") : "left"));
  const row = (tag, texts) => make("tr", {}, ...head.map((_, index) => {
    const cell = make(tag, {}, ...inline(texts[index] ?? ""));
    cell.style.textAlign = aligns[index];
    return cell;
  }));
  add(end, () => make("div", { className: "table" }, make("table", {},
    make("thead", {}, row("th", head)), make("tbody", {}, ...rows.map((texts) => row("td", texts))))));
}

/** Tell whether a line parts a table's head from its rows. */
function isAligns(line) {
  return Boolean(line?.includes("-")) && ALIGNS.test(line.trim());
}

/** The cells of a table's line; a \| is no border. */
function cells(line) {
  return line.trim().replace(BORDERS, "").split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

/** Add a list: the items, with blank lines between and in them. */
function addList(lines, at, add, depth) {
  const [, indent, bullet, number] = lines[at].match(ITEM);
  const isItem = (line) => {
    const item = line.match(ITEM);
    return item && item[1].length <= indent.length && Boolean(item[2]) === Boolean(bullet) && !RULE.test(line);
  };
  const items = [];
  let end = at;
  while (end < lines.length) {
    const line = lines[end];
    const deeper = line.search(/\S/) > indent.length;
    if (isItem(line)) items.push([line.match(ITEM)[4]]);
    else if (deeper) items.at(-1).push(line.slice(indent.length + 1));
    else if (!line.trim()) {
      let next = end;
      while (next < lines.length && !lines[next].trim()) next += 1;
      if (next === lines.length || (!isItem(lines[next]) && lines[next].search(/\S/) <= indent.length)) break;
      items.at(-1).push("");
      end = next - 1;
    } else if (begins(line, depth)) break;
    else items.at(-1).push(line);
    end += 1;
  }
  add(end, () => {
    const list = make(bullet ? "ul" : "ol", {}, ...items.map((item) =>
      make("li", {}, ...blocks(dedented(item), false, depth + 1).map((block) => block.make()))));
    if (!bullet) list.start = Number(number);
    return list;
  });
}

/** The lines of an item, those after the first without the indentation that they share. */
function dedented([first, ...rest]) {
  const least = Math.min(...rest.filter((line) => line.trim()).map((line) => line.search(/\S/)));
  return [first, ...rest.map((line) => line.slice(Number.isFinite(least) ? least : 0))].join("\n");
}

/** Tell whether a line begins a block of another kind than a paragraph. */
function begins(line, depth) {
  return FENCE.test(line) || RULE.test(line) || FINAL.test(line) || HEADING.test(line) || line.trim() === "\\[" ||
    line.trim() === "$$" || (ITEM.test(line) && depth < DEEPEST);
}

function addParagraph(lines, at, add, depth) {
  let end = at + 1;
  const isTable = (line) => line.includes("|") && isAligns(lines[end + 1]);
  while (end < lines.length && lines[end].trim() && !begins(lines[end], depth) && !isTable(lines[end])) end += 1;
  const text = lines.slice(at, end).join("\n").trim();
  add(end, () => make("p", {}, ...inline(text)));
}

/** The final answer, in place of its mark. */
function final(answer) {
  return make("p", { className: "final" }, make("span", { textContent: "Answer" }), " ", make("strong", { textContent: answer.trim() }));
}

function inline(text) {
  return text.split(INLINE).flatMap((part, index) => {
    if (!part) return [];
    if (index % 2 === 0) return [part];
    if (part.startsWith("`")) return [make("code", { textContent: part.slice(1, -1) })];
    if (part.startsWith("**")) return [make("strong", {}, ...inline(part.slice(2, -2)))];
    return part.startsWith("\\boxed") ? math(part) : math(part.slice(2, -2).trim());
  });
}

/** A formula as plain text, its boxed answer marked. */
function math(text) {
  const found = text.match(BOXED);
  if (!found) return text ? [make("span", { className: "math", textContent: plain(text) })] : [];
  const rest = text.slice(found.index + found[0].length);
  return [...math(text.slice(0, found.index)), make("mark", { textContent: plain(found[1]) }), ...math(rest)];
}

function plain(tex) {
  return tex
    .replace(new RegExp(String.raw`\\[dt]?frac${BRACES}${BRACES}`, "g"), (_, a, b) => `${group(a)}/${group(b)}`)
    .replace(new RegExp(String.raw`\\(?:text|mathrm|mathbf|textbf)${BRACES}`, "g"), "$1")
    .replace(new RegExp(String.raw`\\sqrt${BRACES}`, "g"), "√($1)")
    .replace(/\\([A-Za-z]+)/g, (whole, name) => SYMBOLS[name] ?? whole)
    .replace(/\\([%$#&_{},;: ])/g, (_, c) => (",;: ".includes(c) ? " " : c));
}

function group(part) {
  return /^[\w.]+$/.test(part) ? part : `(${part})`;
}
