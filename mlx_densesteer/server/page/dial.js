/** The dial: which vector, how strong, where. */

import { brief } from "/page/steps.js";
import { make } from "/page/transcript.js";

const element = (id) => document.getElementById(id);
const FALLBACK = 4; // times the default strength, where no dose is known

export class Dial {
  /** @param {object} overview what /v1/steering tells @param {() => void} changed */
  constructor(overview, changed) {
    this.overview = overview;
    this.changed = changed;
    const none = overview.vectors.length === 0;
    element("dial").hidden = none;
    element("no-vectors").hidden = !none;
    if (none) return;
    fill(element("vector"), overview.vectors.map((one) => one.name));
    fill(element("positions"), overview.positions);
    element("presets").replaceChildren(...overview.presets.map((preset) =>
      make("button", { type: "button", textContent: preset.label, onclick: () => this.set(preset.steering) })));
    element("vector").onchange = () => this.set({ vector: element("vector").value, ...this.vector.default });
    element("strength").oninput = () => this.turn(Number(element("strength").value));
    element("strength-number").oninput = () => this.turn(Number(element("strength-number").value), true);
    element("zero").onclick = () => this.turn(0);
    element("layer-from").onchange = () => this.bound(true);
    element("layer-to").onchange = () => this.bound(false);
    element("positions").onchange = () => this.tell();
    this.set({ vector: overview.vectors[0].name, ...overview.vectors[0].default });
  }

  get vector() {
    return this.overview.vectors.find((one) => one.name === element("vector").value);
  }

  /** What to send with a request; null is the stock model. */
  get steering() {
    if (!this.overview.vectors.length || !this.strength) return null;
    return {
      vector: this.vector.name, strength: this.strength, layers: this.layers,
      positions: element("positions").value,
    };
  }

  /** Relative dose, the sum over the layers; null where it is not known. */
  get dose() {
    const unit = this.vector.unit_dose;
    if (!unit || this.layers.some((layer) => !(layer in unit))) return null;
    return this.layers.reduce((sum, layer) => sum + unit[layer], 0) * Math.abs(this.strength);
  }

  /** @param {{vector: string, strength: number, layers: number[], positions: string}} setting */
  set(setting) {
    element("vector").value = setting.vector;
    const { layers } = this.vector;
    for (const id of ["layer-from", "layer-to"]) fill(element(id), layers);
    this.layers = setting.layers; // a preset may leave some out in between
    element("layer-from").value = Math.min(...setting.layers);
    element("layer-to").value = Math.max(...setting.layers);
    element("positions").value = setting.positions;
    this.turn(setting.strength);
  }

  /** Set the strength; while a number is typed its field is left alone. */
  turn(strength, typing = false) {
    this.strength = Number.isFinite(strength) ? strength : 0;
    const range = element("strength");
    const most = Math.max(this.most(), Math.abs(this.strength));
    range.min = -most;
    range.max = most;
    range.step = step(most);
    range.value = this.strength;
    if (!typing) element("strength-number").value = brief(this.strength);
    this.tell();
  }

  /** Take the layers between the two choices, kept in order. */
  bound(fromMoved) {
    const [from, to] = [element("layer-from"), element("layer-to")];
    if (Number(from.value) > Number(to.value)) (fromMoved ? to : from).value = fromMoved ? from.value : to.value;
    const [first, last] = [Number(from.value), Number(to.value)];
    this.layers = this.vector.layers.filter((layer) => layer >= first && layer <= last);
    this.turn(this.strength);
  }

  /** The end of the range: the dose at which models collapse, or a multiple of the default. */
  most() {
    const unit = this.vector.unit_dose;
    const total = unit ? this.layers.reduce((sum, layer) => sum + (unit[layer] ?? 0), 0) : 0;
    return total > 0 ? Number((1 / total).toPrecision(2)) : FALLBACK * Math.abs(this.vector.default.strength || 1);
  }

  tell() {
    const { dose, strength } = this;
    const large = dose !== null && dose >= this.overview.large_dose;
    const towards = strength ? (strength > 0 ? "towards dense" : "towards sparse") : "unsteered";
    const share = dose === null || !strength ? "" : `, ${brief(100 * dose)} % of the residual stream`;
    const text = `${brief(strength)}, ${towards}${share}${large ? ": so large a dose usually ruins the answer" : ""}`;
    element("dose").textContent = text;
    element("dose").classList.toggle("warn", large);
    element("strength").setAttribute("aria-valuetext", text);
    this.changed();
  }
}

function fill(select, values) {
  select.replaceChildren(...values.map((value) => make("option", { value, textContent: value })));
}

/** A step of about a hundredth of the range, as a round number. */
function step(most) {
  return 10 ** Math.floor(Math.log10(most / 20));
}
