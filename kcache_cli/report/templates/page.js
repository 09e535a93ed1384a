"use strict";
(() => {
  const tip = document.createElement("div");
  tip.className = "tip";
  document.body.append(tip);
  const hide = () => { tip.style.display = "none"; };
  const show = (event, text) => {
    tip.textContent = text;
    tip.style.display = "block";
    const box = tip.getBoundingClientRect();
    const left = Math.min(event.clientX + 14, innerWidth - box.width - 8);
    const below = event.clientY + 18;
    tip.style.left = Math.max(8, left) + "px";
    tip.style.top = (below + box.height > innerHeight ? event.clientY - box.height - 12 : below) + "px";
  };
  const data = JSON.parse(document.getElementById("data").textContent);

  for (const plot of document.querySelectorAll(".plot")) {
    const chart = data.charts[plot.dataset.chart];
    const cross = document.createElement("div");
    cross.className = "cross";
    plot.append(cross);
    plot.addEventListener("pointermove", (event) => {
      const box = plot.getBoundingClientRect();
      const point = Math.max(0, Math.min(data.readout.length - 1,
        Math.floor((event.clientX - box.left) / box.width * data.readout.length)));
      cross.style.display = "block";
      cross.style.left = (point + .5) / data.readout.length * 100 + "%";
      const lines = chart.filter((shape) => shape.values[point]).map((shape) => shape.label + "  " + shape.values[point]);
      show(event, [data.readout[point], ...lines].join("\n"));
    });
    plot.addEventListener("pointerleave", () => { cross.style.display = "none"; hide(); });
  }

  const spans = new Map();
  for (const span of document.querySelectorAll(".words span:not(.gap)")) {
    const bucket = Math.floor(span.dataset.start / data.bucket);
    if (!spans.has(bucket) && span.dataset.sequence === "0") spans.set(bucket, span);
  }
  for (const map of document.querySelectorAll(".map")) {
    const bytes = (text) => Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
    const cells = bytes(map.dataset.cells), held = bytes(map.dataset.held);
    const rows = +map.dataset.rows, columns = +map.dataset.columns, top = +map.dataset.top;
    const find = (event) => {
      const box = map.getBoundingClientRect();
      const at = (where, size, count) => Math.max(0, Math.min(count - 1, Math.floor(where / size * count)));
      return [at(event.clientY - box.top, box.height, rows), at(event.clientX - box.left, box.width, columns)];
    };
    map.addEventListener("pointermove", (event) => {
      const [row, column] = find(event);
      const value = cells[row * columns + column], weight = held[row * columns + column];
      const share = (value / 255) ** 2 * top;
      const first = column * data.bucket, last = Math.min(data.tokens, first + data.bucket) - 1;
      const words = spans.get(column);
      const text = words ? words.textContent.trim().slice(0, 220) : "";
      show(event, `${data.rows[map.dataset.map][row]} · tokens ${first.toLocaleString("en")}–${last.toLocaleString("en")}\n` +
        `${value === 255 ? "≥ " : ""}${(share * 100).toFixed(2)} % of its picks · ` +
        `mass ${weight === 255 ? "-" : weight < 26 ? "<1 %" : ((weight / 254) ** 2 * 100).toFixed(1) + " %"}` +
        (text ? `\n\n${text}` : ""));
    });
    map.addEventListener("pointerleave", hide);
    map.addEventListener("click", (event) => {
      const words = spans.get(find(event)[1]);
      if (!words) return;
      for (const seen of document.querySelectorAll(".seen")) seen.classList.remove("seen");
      words.classList.add("seen");
      words.scrollIntoView({ block: "center", behavior: "smooth" });
    });
  }

  for (const head of document.querySelectorAll(".sortable th")) {
    const sort = () => {
      const table = head.closest("table"), body = table.tBodies[0], column = head.cellIndex;
      const down = head.getAttribute("aria-sort") !== "descending" && column > 2 || head.getAttribute("aria-sort") === "ascending";
      for (const other of table.querySelectorAll("th")) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const key = (row) => row.cells[column].dataset.key;
      const compare = (one, other) => isNaN(key(one)) ? key(one).localeCompare(key(other)) : key(one) - key(other);
      body.append(...[...body.rows].sort((one, other) => down ? compare(other, one) : compare(one, other)));
    };
    head.tabIndex = 0;
    head.addEventListener("click", sort);
    head.addEventListener("keydown", (event) => { if (event.key === "Enter") sort(); });
  }
})();
