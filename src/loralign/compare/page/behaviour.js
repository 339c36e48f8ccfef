"use strict";
(() => {
  const root = document.documentElement, all = (query, within = document) => [...within.querySelectorAll(query)];

  // An arm under the pointer, or one that is pinned, comes forward in every figure of its study.
  const pinned = new Map();
  const show = (study, arm) => {
    study.classList.toggle("focus", arm !== undefined);
    for (const e of all("[data-arm]", study)) e.classList.toggle("on", e.dataset.arm === arm);
  };
  for (const study of all("[data-study]")) {
    const rest = () => show(study, pinned.get(study));
    study.addEventListener("pointerover", (event) => {
      const at = event.pointerType === "touch" ? null : event.target.closest("[data-arm]");
      if (at) show(study, at.dataset.arm); else rest();
    });
    study.addEventListener("pointerleave", rest);
    for (const chip of all(".chips button", study))
      chip.addEventListener("click", () => {
        const same = pinned.get(study) === chip.dataset.arm;
        if (same) pinned.delete(study); else pinned.set(study, chip.dataset.arm);
        for (const c of all(".chips button", study)) c.setAttribute("aria-pressed", String(!same && c === chip));
        rest();
      });
  }

  // Tooltips.
  const tip = document.getElementById("tip");
  const place = (event) => {
    const at = event.target.closest?.("[data-tip]");
    tip.classList.toggle("on", Boolean(at));
    if (!at) return;
    tip.textContent = at.dataset.tip;
    const box = tip.getBoundingClientRect();
    const x = Math.min(event.clientX + 14, innerWidth - box.width - 8);
    const y = event.clientY + 18 + box.height > innerHeight ? event.clientY - box.height - 12 : event.clientY + 18;
    tip.style.transform = `translate(${Math.max(8, x)}px, ${y}px)`;
  };
  addEventListener("pointermove", place);
  addEventListener("pointerdown", place);

  // Tables: a click sorts by a column, a second one the other way round; empty cells stay last.
  const key = (row, column) => {
    const cell = row.cells[column], value = cell.dataset.v;
    return value === undefined ? cell.textContent.trim() : value === "" ? null : Number(value);
  };
  const order = (a, b, sign) =>
    a === null || b === null ? (a === null) - (b === null)
      : sign * (typeof a === "number" ? a - b : a.localeCompare(b, undefined, { numeric: true }));
  for (const head of all("th button"))
    head.addEventListener("click", () => {
      const th = head.parentElement, table = th.closest("table"), body = table.tBodies[0];
      const up = th.getAttribute("aria-sort") !== "ascending", column = th.cellIndex;
      for (const other of all("th", table)) other.removeAttribute("aria-sort");
      th.setAttribute("aria-sort", up ? "ascending" : "descending");
      const rows = [...body.rows].sort((a, b) => order(key(a, column), key(b, column), up ? 1 : -1));
      body.append(...rows);
    });

  // Light and dark: the system's choice until the button is used.
  const dark = matchMedia("(prefers-color-scheme: dark)"), theme = document.getElementById("theme");
  const now = () => root.dataset.theme || (dark.matches ? "dark" : "light");
  const name = () => { theme.textContent = now() === "dark" ? "Light" : "Dark"; };
  theme.addEventListener("click", () => { root.dataset.theme = now() === "dark" ? "light" : "dark"; name(); });
  dark.addEventListener("change", name);
  theme.hidden = false;
  name();

  // The data of the page as files.
  for (const link of all("a[data-from]")) {
    const source = document.getElementById(link.dataset.from);
    link.href = URL.createObjectURL(new Blob([source.textContent.trim()], { type: "application/json" }));
  }
})();
