/** Light or dark: as the system says, until somebody chooses. */

const STORE = "densesteer.theme";
const system = matchMedia("(prefers-color-scheme: dark)");

/** @param {HTMLButtonElement} button */
export function themed(button) {
  const show = () => {
    const dark = (localStorage.getItem(STORE) ?? (system.matches ? "dark" : "light")) === "dark";
    document.documentElement.dataset.theme = dark ? "dark" : "light";
    button.setAttribute("aria-pressed", String(dark));
  };
  button.onclick = () => {
    localStorage.setItem(STORE, document.documentElement.dataset.theme === "dark" ? "light" : "dark");
    show();
  };
  system.addEventListener("change", show);
  show();
}
