// Local times, keys, buttons that copy, and charts.
"use strict";

function addLocalTimes(root) {
  for (const time of root.querySelectorAll("time[datetime]")) {
    time.title = new Date(time.dateTime).toLocaleString(undefined, { dateStyle: "full", timeStyle: "long" });
  }
}

document.addEventListener("keydown", (event) => {
  const isTyping = event.target.closest("input, textarea, select");
  if (event.key === "/" && !isTyping && !event.ctrlKey && !event.metaKey && !event.altKey) {
    event.preventDefault();
    document.getElementById("find")?.focus();
  }
});
document.addEventListener("htmx:beforeSwap", (event) => {  // do not replace a part that the reader types in or has focused with the keyboard
  if (event.detail.target.id === "live" && event.detail.target.querySelector(":focus-visible")) event.detail.shouldSwap = false;
});
function offerCopies(root) {
  for (const button of root.querySelectorAll("button[data-copy]")) {
    button.hidden = !navigator.clipboard;
    button.onclick = async () => {
      await navigator.clipboard.writeText(document.querySelector(button.dataset.copy).textContent);
      button.textContent = "Copied";
    };
  }
}
function offerSelectAll(root) {
  for (const box of root.querySelectorAll("[data-select-all]")) {
    const all = box.closest("table").querySelectorAll("input[name=id]");
    box.hidden = false;
    box.onchange = () => all.forEach((other) => { other.checked = box.checked; });
  }
}
document.addEventListener("keydown", (event) => {
  const form = event.target.closest("form.query");
  if (form && event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
});
// Charts of a definition: its size, and who entered and exited. Both show the same time; dragging zooms, a double click
// shows everything again. Colours are those of the page, so they are read again when the reader's theme changes.

const isDark = window.matchMedia("(prefers-color-scheme: dark)");

function colourOf(element, name) {
  const probe = element.appendChild(document.createElement("span"));
  probe.className = name;
  const colour = getComputedStyle(probe).color;
  probe.remove();
  return colour;
}

function makeCharts(element, points) {
  const soft = colourOf(element, "state");
  const cursor = { sync: { key: "runs", scales: ["x", null] }, drag: { x: true, y: false } };
  const when = (seconds, incr) => new Date(seconds * 1000).toISOString().slice(...(incr < 86400 ? [5, 16] : incr < 2400000 ? [0, 10] : [0, 7])).replace("T", " ");
  const axis = { stroke: soft, grid: { stroke: `color-mix(in srgb, ${soft} 20%, transparent)`, width: 1 }, ticks: { show: false } };
  const count = (_, values) => values.map((value) => (Number.isInteger(value) ? value.toLocaleString("en") : ""));
  const figure = (_, value) => (value === null ? "–" : value.toLocaleString("en"));
  const last = points.times.length - 1;
  const showLast = (chart) => chart.cursor.idx ?? chart.setLegend({ idx: last }, false);  // while nobody points at a run
  const line = (label, colour, more) => ({ label, stroke: colour, width: 1.6, value: figure, points: { show: points.times.length < 60 }, paths: uPlot.paths.stepped({ align: 1 }), ...more });
  const time = { label: "As of", value: "{YYYY}-{MM}-{DD} {HH}:{mm}" };
  const chart = (height, label, series, data) => {
    const place = element.appendChild(document.createElement("div"));
    place.setAttribute("role", "img");
    place.setAttribute("aria-label", label);
    const options = {
      width: element.clientWidth, height, cursor, padding: [null, 36, null, null], series: [time, ...series], scales: { y: { range: (_, low, high) => [0, Math.max(1, high * 1.08)] } }, hooks: { ready: [showLast], setCursor: [showLast] }, tzDate: (seconds) => uPlot.tzDate(new Date(seconds * 1000), "Etc/UTC"),
      axes: [{ ...axis, space: 90, values: (_, splits, __, ___, incr) => splits.map((seconds) => when(seconds, incr)) }, { ...axis, values: count, size: 64 }],
    };
    return new uPlot(options, [points.times, ...data], place);
  };
  const busy = colourOf(element, "state busy");
  element.replaceChildren();
  return [
    chart(220, "Chart of the size over time; the table of runs has the figures",
      [line("Members", busy, { fill: `color-mix(in srgb, ${busy} 12%, transparent)` })], [points.members]),
    chart(150, "Chart of who entered and exited in each run; the table of runs has the figures",
      [line("Entered", colourOf(element, "state good")), line("Exited", colourOf(element, "state bad"), { dash: [5, 3] })], [points.entered, points.exited]),
  ];
}

async function showCharts(element) {
  const answer = await fetch(element.dataset.sizes);
  if (!answer.ok) return; // keep the chart that the server drew
  const points = await answer.json();
  let charts = makeCharts(element, points);
  isDark.addEventListener("change", () => { charts = makeCharts(element, points); });
  new ResizeObserver(() => charts.forEach((chart) => chart.setSize({ width: element.clientWidth, height: chart.height }))).observe(element);
}

document.addEventListener("htmx:afterSwap", () => addLocalTimes(document));
document.addEventListener("htmx:afterSwap", () => offerCopies(document));
document.addEventListener("htmx:afterSwap", () => offerSelectAll(document));
offerCopies(document);
offerSelectAll(document);
const here = document.querySelector(".top [aria-current]");
if (here) here.parentElement.scrollLeft = here.offsetLeft - 80; // on a phone the menu scrolls
addLocalTimes(document);
document.querySelectorAll("[data-sizes]").forEach(showCharts);
