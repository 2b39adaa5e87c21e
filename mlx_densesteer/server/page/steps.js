/** Steps and density of a text, as mlx_densesteer/density.py counts them. */

const BLANK_LINE = /\n[^\S\n]*\n/;

/** @param {string} text @returns {string[]} the blocks between blank lines, stripped, none empty */
export function splitSteps(text) {
  return text.split(BLANK_LINE).map((step) => step.trim()).filter(Boolean);
}

/** @param {number} number @param {string} noun */
export function count(number, noun) {
  return `${number} ${noun}${number === 1 ? "" : "s"}`;
}

/** A number as people write it: no more digits than it deserves. */
export function brief(number) {
  return String(Number(number.toPrecision(3)));
}
