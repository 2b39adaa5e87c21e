/** How answers are generated, and what the page remembers of its controls. */

import { element } from "/page/dom.js";

const STORE = "densesteer.settings";
const NUMBERS = { "max-tokens": 512, temperature: 0, "top-p": 1, seed: null };
const SWITCHES = { compare: true, plain: false };

/** Wire the controls; `changed` is called with each change. */
export function wireSettings(changed) {
  const kept = remembered();
  for (const [id, usual] of Object.entries(NUMBERS)) {
    const field = element(id);
    field.value = kept[id] ?? usual ?? "";
    // a number that cannot be is replaced by the nearest that can, and nothing is ever refused
    field.oninput = () => remember(id, number(id));
    field.onchange = () => { field.value = number(id) ?? ""; };
  }
  for (const [id, usual] of Object.entries(SWITCHES)) {
    const box = element(id);
    box.checked = kept[id] ?? usual;
    box.onchange = () => { remember(id, box.checked); changed(); };
  }
}

/** What a request says beside its messages and steering. */
export function sampling() {
  const [temperature, top_p, seed] = [number("temperature"), number("top-p"), number("seed")];
  return {
    max_tokens: number("max-tokens"), temperature,
    ...(temperature ? { top_p, ...(seed === null ? {} : { seed }) } : {}),
  };
}

/** @returns {number | null} within the bounds of its field */
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
    // full: what the controls say now still holds
  }
}
