/** The dial: which vector, how strong, where. */

import { element, fill, make } from "/page/dom.js";
import { brief, describe, percent } from "/page/words.js";

const FALLBACK = 4; // times the default strength: the range if no dose is known
const CATCH = 0.015; // a dragged dial stops at 0 and at the default within this share of the range
const FIVE = [-1, 0, 0.5, 1, 2]; // times the default dose: what "Try five strengths" asks
const SHARE = 0.25; // of the range: what they are times of if the default is no steering
const FIRST = /^first:[1-9][0-9]{0,8}$/; // positions
const KEYS = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1, PageUp: 5, PageDown: -5 }; // steps

export class Dial {
  /**
   * @param {object} overview the JSON of /v1/steering
   * @param {object | undefined} setting the last setting, with its vector's fingerprint; used if it is still possible
   * @param {(setting: object) => void} changed
   */
  constructor(overview, setting, changed) {
    this.overview = overview;
    this.changed = changed;
    this.strength = 0;
    this.name = null; // the vector's
    const none = overview.vectors.length === 0;
    element("dial").hidden = none;
    element("where").hidden = none;
    element("no-vectors").hidden = !none;
    if (none) return;
    element("vectors").replaceChildren(...overview.vectors.map((one) => this.choice(one)));
    fill(element("positions"), overview.positions);
    this.wire();
    const first = overview.vectors[0];
    this.set(this.fits(setting) ? setting : { vector: first.name, ...first.default });
  }

  wire() {
    const range = element("strength");
    element("usual").onclick = () => this.toDefault(this.vector);
    range.oninput = () => this.turn(this.caught(Number(range.value)));
    range.onkeydown = (event) => this.key(event);
    element("strength-number").oninput = () => this.turn(element("strength-number").valueAsNumber, true);
    element("strength-number").onchange = () => this.turn(this.strength, Number.isFinite(element("strength-number").valueAsNumber));
    element("zero").onclick = () => this.turn(0);
    element("layer-from").onchange = () => this.bound(true);
    element("layer-to").onchange = () => this.bound(false);
    element("positions").onchange = () => this.tell();
  }

  /** One vector to choose: its name, what it is, and its default. */
  choice(vector) {
    const radio = make("input", { type: "radio", name: "vector", value: vector.name, onchange: () => this.toDefault(vector) });
    const told = make("span", {}, make("strong", { textContent: vector.name }),
      make("span", { className: "hint", textContent: vector.about }),
      make("span", { className: "hint", textContent: `Default: ${describe(vector.default)}` }));
    return make("label", { className: "choice" }, radio, told);
  }

  toDefault(vector) {
    this.set({ vector: vector.name, ...vector.default });
  }

  get vector() {
    return this.overview.vectors.find((one) => one.name === this.name);
  }

  /** Whether the dial stands at the vector's default. */
  get isUsual() {
    const { strength, layers, positions } = this.vector.default;
    return brief(strength) === brief(this.strength) && String(layers) === String(this.layers) && positions === element("positions").value;
  }

  /** Five steerings from sparse to dense at the dial's layers and positions; none is an overdose. */
  get five() {
    if (!this.overview.vectors.length) return [];
    const { setting, unit } = this;
    const usual = this.vector.default;
    const known = unit !== null && this.dose(usual) !== null;
    const full = known ? this.dose(usual) / unit : Math.abs(usual.strength || 1);
    const base = Math.min(full || this.most() * SHARE, this.most() / Math.max(...FIVE));
    return FIVE.map((share) => (share ? { ...setting, strength: share * base } : null));
  }

  /** The dial's vector, strength, layers and positions. */
  get setting() {
    const { strength, layers } = this;
    return { vector: this.name, strength, layers, positions: element("positions").value };
  }

  /** The steering to send with a request; null is the stock model. */
  get steering() {
    return this.overview.vectors.length && this.strength ? this.setting : null;
  }

  /** The dose of strength 1 at the dial's layers, a fraction; null if not known. */
  get unit() {
    return unitDose(this.vector, this.layers);
  }

  /** The dose of a setting, a fraction; null if not known. */
  dose({ vector, strength, layers }) {
    const unit = unitDose(this.overview.vectors.find((one) => one.name === vector), layers);
    return unit === null ? null : unit * Math.abs(strength);
  }

  /** Whether the vector is still there, the same and not another of its name, and can be steered so. */
  fits(setting) {
    const vector = setting && this.overview.vectors.find((one) => one.name === setting.vector);
    return vector && vector.fingerprint === setting.fingerprint && Number.isFinite(setting.strength) && setting.layers?.length > 0 &&
      setting.layers.every((layer) => vector.layers.includes(layer)) &&
      (this.overview.positions.includes(setting.positions) || FIRST.test(setting.positions));
  }

  /** Choose positions; some first tokens, of which there is no list, become a choice by that. */
  offer(positions) {
    const select = element("positions");
    if (![...select.options].some((one) => one.value === positions)) select.add(new Option(positions));
    select.value = positions;
  }

  /** @param {{vector: string, strength: number, layers: number[], positions: string}} setting */
  set(setting) {
    this.name = setting.vector;
    for (const radio of element("vectors").querySelectorAll("input")) radio.checked = radio.value === setting.vector;
    const { layers } = this.vector;
    for (const id of ["layer-from", "layer-to"]) fill(element(id), layers);
    this.layers = setting.layers; // a preset may skip some in between
    element("layer-from").value = Math.min(...setting.layers);
    element("layer-to").value = Math.max(...setting.layers);
    this.offer(setting.positions);
    element("kept").textContent = "";
    this.turn(setting.strength);
  }

  /** Set the strength; keep the number while it is typed. Only a typed number may be beyond the range. */
  turn(strength, typing = false) {
    this.strength = Number.isFinite(strength) ? strength : 0;
    const range = element("strength");
    const most = this.most();
    range.min = -most;
    range.max = most;
    range.value = this.strength;
    if (!typing) element("strength-number").value = brief(this.strength);
    this.paint(most);
    this.tell();
  }

  /** Turn by a round step, so that the opposite key goes back. */
  key(event) {
    const range = element("strength");
    const ends = { Home: Number(range.min), End: Number(range.max) };
    if (!(event.key in KEYS) && !(event.key in ends)) return;
    event.preventDefault();
    const next = ends[event.key] ?? this.strength + KEYS[event.key] * step(Number(range.max));
    this.turn(tidy(Math.min(Number(range.max), Math.max(Number(range.min), next))));
  }

  /** Round a dragged strength; stop at 0 and at the default. */
  caught(strength) {
    const most = Number(element("strength").max);
    const stop = [0, this.vector.default.strength].find((one) => Math.abs(strength - one) < CATCH * 2 * most);
    const fine = step(most) / 10;
    return stop ?? tidy(Math.round(strength / fine) * fine);
  }

  /** Take the layers between the two choices, in order, and keep the dose. */
  bound(fromMoved) {
    const [from, to] = [element("layer-from"), element("layer-to")];
    if (Number(from.value) > Number(to.value)) (fromMoved ? to : from).value = fromMoved ? from.value : to.value;
    const [first, last] = [Number(from.value), Number(to.value)];
    const before = this.unit;
    this.layers = this.vector.layers.filter((layer) => layer >= first && layer <= last);
    const after = this.unit;
    const keeps = before && after && after !== before && this.strength;
    const strength = keeps ? this.strength * before / after : this.strength;
    element("kept").textContent = keeps ? `Strength ${brief(strength)} keeps the dose at these layers.` : "";
    this.turn(strength);
  }

  /** The end of the range: the last round strength below a large dose, or a multiple of the default. */
  most() {
    if (!this.unit) return FALLBACK * Math.abs(this.vector.default.strength || 1);
    const end = this.overview.large_dose / this.unit;
    const round = 10 ** (Math.floor(Math.log10(end)) - 1);
    return tidy(Math.ceil(end / round - 1) * round);
  }

  /** Fill the track from 0, and mark the default. */
  paint(most) {
    const share = (strength) => (Math.max(-most, Math.min(most, strength)) + most) / (2 * most);
    const style = element("dial").style;
    const here = share(this.strength);
    style.setProperty("--a", Math.min(0.5, here));
    style.setProperty("--b", Math.max(0.5, here));
    const marks = [["sparse", -most], ["0", 0], ["dense", most]];
    const usual = this.vector.default.strength;
    element("marks").replaceChildren(...marks.map(([textContent, at]) => mark({ textContent }, share(at))),
      mark({ className: "usual" }, share(usual)));
  }

  tell() {
    const { strength } = this;
    const dose = this.dose(this.setting);
    const large = dose !== null && dose >= this.overview.large_dose;
    const towards = strength ? (strength > 0 ? "towards dense" : "towards sparse") : "unsteered";
    const share = dose === null || !strength ? "" : `, ${percent(dose)} of the residual stream`;
    const text = `${towards}${share}${large ? ": an overdose, which usually ruins the answer" : ""}`;
    element("dose").textContent = text[0].toUpperCase() + text.slice(1);
    element("dose").classList.toggle("warn", large);
    element("strength").setAttribute("aria-valuetext", `${brief(strength)}, ${text}`);
    element("usual").hidden = this.isUsual;
    element("usual").textContent = `Back to the default: ${describe(this.vector.default)}`;
    this.changed(this.setting);
  }
}

/** The dose of strength 1, summed over the layers; null if not known. */
function unitDose(vector, layers) {
  const unit = vector?.unit_dose;
  if (!unit || layers.some((layer) => !(layer in unit))) return null;
  return layers.reduce((sum, layer) => sum + unit[layer], 0) || null;
}

function mark(properties, share) {
  const made = make("span", properties);
  made.style.setProperty("--at", share);
  return made;
}

/** A step of about a hundredth of the range, as a round number. */
function step(most) {
  return 10 ** Math.floor(Math.log10(most / 20));
}

/** Drop the rounding errors of binary fractions. */
function tidy(number) {
  return Number(number.toPrecision(6));
}
