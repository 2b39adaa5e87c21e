/** Light or dark: the user's choice, by default the system's. */

const STORE = "densesteer.theme";
const system = matchMedia("(prefers-color-scheme: dark)");

/** @param {HTMLSelectElement} select */
export function themed(select) {
  const show = () => {
    select.value = localStorage.getItem(STORE) ?? "system";
    const dark = select.value === "dark" || (select.value === "system" && system.matches);
    document.documentElement.dataset.theme = dark ? "dark" : "light";
  };
  select.onchange = () => {
    if (select.value === "system") localStorage.removeItem(STORE);
    else localStorage.setItem(STORE, select.value);
    show();
  };
  system.addEventListener("change", show);
  show();
}
