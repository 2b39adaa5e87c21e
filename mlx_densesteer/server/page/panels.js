/** The two panels: columns beside the conversation on wide screens, else overlays. */

import { element } from "/page/dom.js";

const ROOM = { past: 1120, steer: 800 }; // CSS pixels from which a panel is a column
const TOGGLES = { past: "show-past", steer: "show-steer" };

export function wirePanels() {
  for (const [id, width] of Object.entries(ROOM)) {
    const wide = matchMedia(`(min-width: ${width}px)`);
    const fit = () => show(id, wide.matches);
    wide.addEventListener("change", fit);
    fit();
    element(TOGGLES[id]).onclick = () => {
      const open = element(id).hidden;
      if (open) closeOverlays();
      show(id, open);
      if (open) element(id).querySelector("button, select").focus();
    };
  }
  element("columns").addEventListener("pointerdown", (event) => {
    if (!event.target.closest(".panel")) closeOverlays();
  });
}

/** Close open overlays; return whether there were any. */
export function closeOverlays() {
  const above = Object.keys(ROOM).filter((id) => !element(id).hidden && innerWidth < ROOM[id]);
  for (const id of above) {
    const inside = element(id).contains(document.activeElement);
    show(id, false);
    if (inside) element(TOGGLES[id]).focus();
  }
  return above.length > 0;
}

function show(id, open) {
  element(id).hidden = !open;
  element("columns").classList.toggle(`with-${id}`, open);
  element(TOGGLES[id]).setAttribute("aria-expanded", String(open));
}
