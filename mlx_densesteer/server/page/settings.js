/** Sampling settings, and the remembered state of the controls. */

import { element } from "/page/dom.js";

const STORE = "densesteer.settings";
const NUMBERS = { "max-tokens": 512, temperature: 0, "top-p": 1, seed: null };
const SWITCHES = { compare: true, plain: false };

/** Wire the controls; `changed` is called when a switch changes. */
export function wireSettings(changed) {
  const kept = remembered();
  for (const [id, usual] of Object.entries(NUMBERS)) {
    const field = element(id);
    field.value = kept[id] ?? usual ?? "";
    // an impossible number is replaced by the nearest possible one
    field.oninput = () => remember(id, number(id));
    field.onchange = () => { field.value = number(id) ?? ""; };
  }
  for (const [id, usual] of Object.entries(SWITCHES)) {
    const box = element(id);
    box.checked = kept[id] ?? usual;
    box.onchange = () => { remember(id, box.checked); changed(); };
  }
}

/** The sampling fields of a request. */
export function sampling() {
  const [temperature, top_p, seed] = [number("temperature"), number("top-p"), number("seed")];
  return {
    max_tokens: number("max-tokens"), temperature,
    ...(temperature ? { top_p, ...(seed === null ? {} : { seed }) } : {}),
  };
}

/** @returns {number | null} within the limits of its field */
function number(id) {
  const field = element(id);
  const given = field.valueAsNumber;
  if (!Number.isFinite(given)) return NUMBERS[id];
  const [least, most] = [Number(field.min), field.max === "" ? Number.MAX_SAFE_INTEGER : Number(field.max)];
  const inside = Math.min(most, Math.max(least, given));
  return field.step === "1" ? Math.round(inside) : inside;
}

export function remembered() {
  try {
    return JSON.parse(localStorage.getItem(STORE) ?? "{}") ?? {};
  } catch {
    return {};
  }
}

export function remember(name, value) {
  try {
    localStorage.setItem(STORE, JSON.stringify({ ...remembered(), [name]: value }));
  } catch {
    // storage is full: the controls still apply
  }
}
