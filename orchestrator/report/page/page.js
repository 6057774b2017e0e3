"use strict";
// One evaluation example at a time; without this script, and in print, all of them are shown.
(function () {
  document.documentElement.classList.add("js");
  const buttons = Array.from(document.querySelectorAll(".tabs button"));
  const parts = Array.from(document.querySelectorAll(".example"));
  function show(id) {
    parts.forEach((part) => { part.hidden = part.id !== id; });
    buttons.forEach((button) => {
      const own = button.dataset.of === id;
      button.setAttribute("aria-selected", String(own));
      button.tabIndex = own ? 0 : -1;
    });
  }
  buttons.forEach((button, place) => {
    button.addEventListener("click", () => show(button.dataset.of));
    button.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      const next = buttons[(place + step + buttons.length) % buttons.length];
      show(next.dataset.of);
      next.focus();
    });
  });
  if (parts.length) show(parts[0].id);
  window.addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((d) => { d.open = true; }));
})();
