/** Steps and density of a text, as mlx_densesteer/generation/answer.py counts them; numbers as people write them. */

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

/** 0-based layers as text: "5", "2-4", "0, 3". @param {number[]} layers */
export function layersText(layers) {
  const whole = layers.length > 2 && layers.every((layer, i) => layer === layers[0] + i);
  return whole ? `${layers[0]}-${layers.at(-1)}` : layers.join(", ");
}

/** A steering in words; what falsy stands for is the stock model. */
export function describe(steering) {
  if (!steering) return "unsteered";
  const { vector, strength, layers, positions } = steering;
  return `${vector} ${strength}, layer${layers.length > 1 ? "s" : ""} ${layersText(layers)}, ${positions}`;
}
