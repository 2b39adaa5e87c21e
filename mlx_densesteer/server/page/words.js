/** Numbers, steerings and differences in words. */

/** @param {number} number @param {string} noun */
export function count(number, noun) {
  return `${number} ${noun}${number === 1 ? "" : "s"}`;
}

/** A number with three digits at most, apart from zeros. */
export function brief(number) {
  return String(Number(number.toPrecision(3)));
}

/** A share in per cent: "20 %", with a space that does not break. @param {number} share */
export function percent(share) {
  return `${brief(100 * share)}\u00a0%`;
}

/** How strong: "20 % (strength 4.76)"; the dose has the strength's sign. @param {number | null} dose */
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

/**
 * A steering in words: "dense, 20 %, layer 5"; null is the stock model.
 * @param {object | null} steering @param {boolean} named name the vector too: there are several
 */
export function describe(steering, named = false) {
  if (!steering) return "unsteered";
  const { vector, strength, dose, layers, positions } = steering;
  const size = typeof dose === "number" ? percent(Math.abs(dose)) : `strength ${brief(Math.abs(strength))}`;
  const place = `layer${layers.length > 1 ? "s" : ""} ${layersText(layers)}${where(positions)}`;
  return `${strength < 0 ? "sparse" : "dense"}, ${size}, ${place}${named ? `, vector ${vector}` : ""}`;
}

/** The steering of an answer: what the server applied, until then what was asked. */
export function steeringOf({ steering, asked, dose }) {
  if (steering !== undefined) return steering;
  return asked?.steering ? { ...asked.steering, dose } : null;
}

/** What makes two models one: the same weights in the same precision. @returns {string} */
export function identity(model) {
  const { fingerprint, dtype, quantization } = model ?? {};
  return JSON.stringify([fingerprint, dtype, quantization]);
}

/** What an answer was asked with beside its steering: the model, the system message, the sampling. @returns {string} */
export function circumstances({ asked, system, model }) {
  const { temperature, top_p, seed } = asked ?? {};
  return JSON.stringify([identity(model), system ?? "", temperature, top_p, seed]);
}

/** Where an answer stands among those of other strengths: its dose with the strength's sign; 0 is unsteered. */
export function standing(answer) {
  const steering = steeringOf(answer);
  return steering ? Math.sign(steering.strength) * Math.abs(steering.dose ?? steering.strength) : 0;
}

/** The steps of an answer: how many, and how many between blank lines. @returns {null | {whole: number, literal: number}} */
export function stepsOf({ starts, usage }) {
  const literal = usage?.completion_tokens_details?.steps;
  return literal === undefined ? null : { whole: starts?.length ?? literal, literal };
}

/**
 * What steering changed, in words; null while one of the two is not complete.
 * @returns {null | {headline: string[], detail: string, same: boolean | null}} `same`: whether the answers are; null is not known
 */
export function changed(steered, stock) {
  const [now, before] = [stepsOf(steered), stepsOf(stock)];
  if (!now || !before) return null;
  const [tokens, usual] = [steered.usage.completion_tokens, stock.usage.completion_tokens];
  const detail = tokens === usual ? `${count(tokens, "token")}, as unsteered` : `${count(tokens, "token")} instead of ${usual}`;
  if (steered.reason === "length" && stock.reason !== "length")
    return { headline: [`Not finished after ${count(tokens, "token")}`], detail: `Unsteered: ${count(before.whole, "step")}, ${count(usual, "token")}`, same: false };
  const steps = now.whole === before.whole ? `${count(now.whole, "step")}, as unsteered` : `${count(now.whole, "step")} instead of ${before.whole}`;
  const [here, there] = [steered.stated, stock.stated];
  const same = here && there ? here === there : here || there ? false : null;
  const short = [here, there].every((one) => !one || one.length < 25);
  const other = short ? `another answer: ${here ?? "none"} instead of ${there ?? "none"}` : "another answer";
  const verdict = same === null ? [] : [same ? "same answer" : other];
  return { headline: [steps, ...verdict], detail, same };
}
