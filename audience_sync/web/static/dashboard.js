// What the pages do beyond HTML: local times, the search key, and the charts.
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
document.addEventListener("htmx:beforeSwap", (event) => {  // what the reader types, or has reached by keyboard, stays
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
document.addEventListener("keydown", (event) => {
  const form = event.target.closest("form.query");
  if (form && event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
});

document.addEventListener("htmx:afterSwap", () => addLocalTimes(document));
document.addEventListener("htmx:afterSwap", () => offerCopies(document));
offerCopies(document);
addLocalTimes(document);
