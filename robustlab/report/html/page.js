"use strict";
const key = (row, column) => {
  const cell = row.cells[column];
  const value = cell.dataset.v ?? cell.textContent.trim();
  const number = Number(value);
  return value === "" || Number.isNaN(number) ? value.toLowerCase() : number;
};
const order = (a, b) => (typeof a === typeof b ? (a < b ? -1 : a > b ? 1 : 0) : typeof a === "number" ? -1 : 1);
document.querySelectorAll("th button").forEach((button) => {
  button.addEventListener("click", () => {
    const head = button.parentElement;
    const body = head.closest("table").tBodies[0];
    const down = head.getAttribute("aria-sort") !== "descending";
    head.parentElement.querySelectorAll("th").forEach((th) => th.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const rows = [...body.rows].sort((a, b) => order(key(a, head.cellIndex), key(b, head.cellIndex)));
    body.append(...(down ? rows.reverse() : rows));
  });
});
document.querySelectorAll("table.fold").forEach((table) => {
  const count = table.tBodies[0].rows.length;
  if (count <= 12) return;
  const more = document.createElement("button");
  more.className = "more";
  more.textContent = `Show all ${count}`;
  more.addEventListener("click", () => { table.classList.remove("folded"); more.remove(); });
  table.classList.add("folded");
  table.parentElement.after(more);
});
document.querySelectorAll("input[data-filter]").forEach((input) => {
  const table = document.getElementById(input.dataset.filter);
  input.addEventListener("input", () => {
    const wanted = input.value.trim().toLowerCase();
    if (wanted) { table.classList.remove("folded"); table.closest("section").querySelector("button.more")?.remove(); }
    for (const row of table.tBodies[0].rows) row.hidden = !row.textContent.toLowerCase().includes(wanted);
  });
});
