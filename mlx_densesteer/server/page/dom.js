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
