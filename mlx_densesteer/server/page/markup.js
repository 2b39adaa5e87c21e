/**
 * Format the model's text: bold, code, headings, simple formulas.
 *
 * Only elements and text nodes are made, so the model's text never becomes HTML. Other markup is shown as
 * it is.
 */

import { make } from "/page/dom.js";

const FENCE = /^\s*```/;
const HEADING = /^#{1,6}\s+(.*)$/;
const FINAL = /^####\s*[-−$€£¥₹\d]/; // GSM8K's mark before the final answer
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
 * Format one step.
 * @param {string} step @param {boolean} fenced the step begins inside a code fence
 * @returns {{nodes: Node[], fenced: boolean}} the nodes, and `fenced` of the next step
 */
export function dress(step, fenced) {
  const nodes = [];
  let code = fenced ? [] : null;
  let formula = false;
  const isBlock = (one) => one?.className === "block";
  const put = (...those) => nodes.push(...(nodes.length && !isBlock(nodes.at(-1)) ? ["\n"] : []), ...those);
  const close = () => { nodes.push(make("code", { className: "block", textContent: code.join("\n") })); code = null; };
  for (const line of step.split("\n")) {
    if (FENCE.test(line)) {
      if (code) close();
      else code = [];
    } else if (code) code.push(line);
    else if (line.trim() === "\\[") formula = true;
    else if (line.trim() === "\\]") formula = false;
    else if (formula) put(...math(line.trim()));
    else if (FINAL.test(line)) put(make("strong", {}, line));
    else if (HEADING.test(line)) put(make("strong", {}, ...inline(line.match(HEADING)[1])));
    else put(...inline(line));
  }
  const open = code !== null;
  if (open && code.length) close();
  return { nodes, fenced: open };
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
