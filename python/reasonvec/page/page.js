/* A read-out of all three measures of the cell under the pointer, the finger or the arrow keys.
   The page is complete without it. Text goes in by textContent only: names come from strangers. */
"use strict";
(() => {
  const root = document.documentElement;
  const read = document.querySelector(".read");
  const maps = [...document.querySelectorAll(".map")];
  if (!read || maps.length === 0) return;
  root.classList.add("js");
  const element = (tag, text) => Object.assign(document.createElement(tag), { textContent: text });
  let on = [];

  const full = (th) => th.dataset.full ?? th.textContent.trim();

  function show(cell) {
    const table = cell.closest("table");
    const map = cell.closest(".map");
    const index = [...map.querySelectorAll("table")].indexOf(table);
    const [row, column] = [cell.parentElement.rowIndex, cell.cellIndex];
    on.forEach((td) => td.classList.remove("on"));
    on = maps.map((m) => m.querySelectorAll("table")[index].rows[row].cells[column]);
    on.forEach((td) => td.classList.add("on"));
    const side = cell.parentElement.cells[0];
    const head = table.rows[0].cells[column];
    const said = on
      .map((td, i) => [maps[i].dataset, td.textContent.trim()])
      .filter(([, value]) => value !== "")
      .map(([map, value]) => element("span", `${map.name} ${value}${map.unit}`));
    if (said.length === 0) said.push(element("span", "no such tensor"));
    read.replaceChildren(element("b", `${full(side)} · ${full(head)}`), ...said.flatMap((part) => [" ", part]));
  }

  for (const table of document.querySelectorAll(".heat")) {
    table.tabIndex = 0;
    const cellOf = (event) => event.target.closest?.("td:not(.rows)");
    const point = (event) => { const td = cellOf(event); if (td) show(td); };
    table.addEventListener("pointerover", point);
    table.addEventListener("click", point);
    table.addEventListener("keydown", (event) => {
      const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
      if (!step) return;
      event.preventDefault();
      const here = on.find((td) => table.contains(td));
      const row = Math.min(Math.max((here ? here.parentElement.rowIndex : 0) + (here ? step[0] : 1), 1), table.rows.length - 1);
      const width = table.rows[row].cells.length;
      const column = Math.min(Math.max((here ? here.cellIndex : 1) + (here ? step[1] : 0), 1), width - 1);
      const next = table.rows[row].cells[column];
      show(next);
      next.scrollIntoView({ block: "nearest" });
    });
  }
})();
