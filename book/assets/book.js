// Long tables sort by a click on the name of a column; a box that scrolls can be reached by the keyboard.
(() => {
  "use strict";
  const UNITS = { "": 1, k: 1e3, M: 1e6, B: 1e9, T: 1e12 };

  // A cell as a number where it begins with one (1,024; 78.9M; 0.92 to 0.97), else its text, as of a shape or a date.
  const value = (row, column) => {
    const text = row.cells[column].textContent.trim().replace(/^−/, "-");
    const number = text.match(/^([-+]?(?:\d[\d,]*\.?\d*|\.\d+)(?:e[-+]?\d+)?)\s?([kMBT]?)(?![\w./-])/);
    return number ? Number(number[1].replaceAll(",", "")) * UNITS[number[2]] : text;
  };

  const compare = (a, b) =>
    typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true });

  const sort = (table, head, original) => {
    const next = { ascending: "descending", descending: "none", none: "ascending" }[head.getAttribute("aria-sort")];
    table.querySelectorAll("[aria-sort]").forEach((other) => other.setAttribute("aria-sort", "none"));
    head.setAttribute("aria-sort", next);
    const valued = original.map((row) => [value(row, head.cellIndex), row]);
    const sign = next === "descending" ? -1 : 1;
    const missing = (cell) => Number(cell === "–" || cell === "");
    if (next !== "none") valued.sort(([a], [b]) => missing(a) - missing(b) || sign * compare(a, b));
    table.tBodies[0].append(...valued.map(([, row]) => row));
  };

  // the theme's arrows that open the sections of a chapter have no name
  for (const arrow of document.querySelectorAll(".bd-sidenav summary")) {
    arrow.setAttribute("aria-label", `Sections of ${arrow.closest("li").querySelector("a").textContent.trim()}`);
  }

  for (const table of document.querySelectorAll("table.sortable")) {
    const original = [...table.tBodies[0].rows];
    for (const head of table.tHead.rows[table.tHead.rows.length - 1].cells) {
      const button = document.createElement("button");
      button.type = "button";
      button.title = "Sort by this column";
      button.append(...head.childNodes);
      head.append(button);
      head.setAttribute("aria-sort", "none");
      button.addEventListener("click", () => sort(table, head, original));
    }
  }

  const reach = (box) => {
    const section = box.closest("section")?.querySelector("h1, h2, h3, h4");
    const label = (box.querySelector("caption") ?? section?.firstChild)?.textContent ?? "table";
    const given = box.scrollWidth > box.clientWidth ? { tabindex: 0, role: "region", "aria-label": label } : {};
    for (const name of ["tabindex", "role", "aria-label"]) {
      if (name in given) box.setAttribute(name, given[name]);
      else box.removeAttribute(name);
    }
  };
  const observer = new ResizeObserver((entries) => entries.forEach((entry) => reach(entry.target)));
  document.querySelectorAll(".wide-table, .pst-scrollable-table-container").forEach((box) => observer.observe(box));

  // A page opened from disk may not fetch the others, and so the search shows titles without the text around what it found.
  if (location.protocol === "file:") DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;
})();
