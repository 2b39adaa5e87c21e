/** The list of past conversations. */

import { element, make, toast } from "/page/dom.js";
import * as history from "/page/history.js";

/**
 * Show the list.
 * @param {string} current the id of the open conversation
 * @param {(conversation: object) => void} open @param {(id: string) => void} removed
 */
export function showPast(current, open, removed) {
  element("conversations").replaceChildren(...history.all().map((one) => {
    const button = make("button", { type: "button", className: "open", title: one.title, onclick: () => open(one) },
      make("span", { className: "title", textContent: one.title }), make("span", { className: "when", textContent: when(one) }));
    button.setAttribute("aria-current", String(one.id === current));
    const remove = make("button", { type: "button", className: "delete quiet", textContent: "✕", onclick: () => forget(one, removed) });
    remove.setAttribute("aria-label", `Delete ${one.title}`);
    return make("li", {}, button, remove);
  }));
  element("forget").disabled = !element("conversations").children.length;
}

/** Ask, then delete all conversations. @param {() => void} removed */
export function forgetAll(removed) {
  const dialog = element("confirm");
  const count = history.all().length;
  const those = count === 1 ? "the conversation" : `all ${count} conversations`;
  element("confirm-text").textContent = `Delete ${those} in this browser? This cannot be undone.`;
  dialog.returnValue = "no";
  dialog.onclose = () => {
    if (dialog.returnValue !== "yes") return;
    history.removeAll();
    removed();
  };
  dialog.showModal();
}

function forget(one, removed) {
  history.remove(one.id);
  removed(one.id);
  toast(`Deleted “${one.title}”.`, () => { history.restore(one); removed(null); });
}

function when({ updated }) {
  return updated ? new Date(updated).toLocaleString(undefined, { dateStyle: "medium", timeStyle: "short" }) : "";
}
