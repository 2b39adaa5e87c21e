/** Elements of the page. */

/** @param {string} id @returns {HTMLElement} */
export const element = (id) => document.getElementById(id);

/** @returns {HTMLElement} */
export function make(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

/** Fill a select with values. */
export function fill(select, values) {
  select.replaceChildren(...[...values].map((value) => make("option", { value, textContent: value })));
}

const SHOWN = 15_000; // milliseconds
let hiding = 0;

/** Show a text for a moment. @param {string} text @param {(() => void) | null} undo takes back what was done */
export function toast(text, undo = null) {
  const place = element("toast");
  const hide = () => { place.hidden = true; };
  element("toast-text").textContent = text;
  element("undo").hidden = !undo;
  element("undo").onclick = () => { hide(); undo(); };
  place.hidden = false;
  clearTimeout(hiding);
  hiding = setTimeout(hide, SHOWN);
}

/** A button that copies a text. @param {() => string} text */
export function copyButton(text, label) {
  const button = make("button", { type: "button", className: "quiet copy", textContent: "Copy" });
  button.setAttribute("aria-label", label);
  button.hidden = !navigator.clipboard; // browsers have none without TLS, except on localhost
  button.onclick = async () => {
    await navigator.clipboard.writeText(text());
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  };
  return button;
}
