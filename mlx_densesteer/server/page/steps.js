/** Steps of a text, as mlx_densesteer/generation/answer.py counts them; numbers and steering in words. */

const BLANK_LINE = /\n[^\S\n]*\n/;

/** @param {string} text @returns {string[]} the blocks between blank lines, stripped, none empty */
export function splitSteps(text) {
  return text.split(BLANK_LINE).map((step) => step.trim()).filter(Boolean);
}

/** @param {number} number @param {string} noun */
export function count(number, noun) {
  return `${number} ${noun}${number === 1 ? "" : "s"}`;
}

/** A number with three digits at most, apart from zeros. */
export function brief(number) {
  return String(Number(number.toPrecision(3)));
}

/** A share in per cent: "20%". @param {number} share */
export function percent(share) {
  return `${brief(100 * share)}%`;
}

/** How strong: "20% (strength 4.76)"; the dose has the strength's sign. @param {number | null} dose */
export function amount(strength, dose) {
  const number = `strength ${brief(strength)}`;
  return typeof dose === "number" ? `${percent(Math.sign(strength) * Math.abs(dose))} (${number})` : number;
}

/** 0-based layers as text: "5", "2-4", "0, 3". @param {number[]} layers */
export function layersText(layers) {
  const whole = layers.length > 2 && layers.every((layer, i) => layer === layers[0] + i);
  return whole ? `${layers[0]}-${layers.at(-1)}` : layers.join(", ");
}

/** Positions in words, where they are not all. */
export function where(positions) {
  return (positions ?? "all") === "all" ? "" : `, ${positions} positions`;
}

/** A steering in words; null is the stock model. */
export function describe(steering) {
  if (!steering) return "unsteered";
  const { vector, strength, dose, layers, positions } = steering;
  return `${vector} ${amount(strength, dose)}, layer${layers.length > 1 ? "s" : ""} ${layersText(layers)}${where(positions)}`;
}
