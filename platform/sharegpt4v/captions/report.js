"use strict";
// One view is a source and a text; it lives in the address (#source=coco&q=red), so that it can be sent.
const cards = [...document.querySelectorAll(".card")].map((node) => ({
  node,
  source: node.dataset.source,
  text: (node.querySelector(".caption").textContent + "\n" + node.querySelector(".mono").textContent).toLowerCase(),
}));
const chips = [...document.querySelectorAll("#chips button")];
const search = document.getElementById("search");
const state = { source: "", q: "" };

function show() {
  const q = state.q.trim().toLowerCase();
  let shown = 0;
  for (const card of cards) {
    const visible = (!state.source || card.source === state.source) && card.text.includes(q);
    card.node.hidden = !visible;
    shown += visible;
  }
  for (const chip of chips) chip.setAttribute("aria-pressed", String(chip.dataset.source === state.source));
  document.getElementById("count").textContent = `${shown} of ${cards.length} shown`;
  document.getElementById("nothing").hidden = shown > 0;
  highlight(q);
}

// Marks the matches without touching the captions' nodes; browsers without the interface just filter.
function highlight(q) {
  if (!window.Highlight) return;
  CSS.highlights.delete("found");
  if (!q) return;
  const ranges = [];
  for (const { node } of cards) {
    if (node.hidden) continue;
    const text = node.querySelector(".caption").firstChild;
    const lower = text ? text.data.toLowerCase() : "";
    if (!text || lower.length !== text.data.length) continue;
    for (let at = lower.indexOf(q); at >= 0; at = lower.indexOf(q, at + q.length)) {
      const range = new Range();
      range.setStart(text, at);
      range.setEnd(text, at + q.length);
      ranges.push(range);
    }
  }
  CSS.highlights.set("found", new Highlight(...ranges));
}

function change(part) {
  Object.assign(state, part);
  const view = new URLSearchParams(Object.entries(state).filter(([, value]) => value));
  history.replaceState(null, "", view.size ? "#" + view : location.pathname + location.search);
  show();
}

function readAddress() {
  if (location.hash && !location.hash.includes("=")) return; // a place in the page, not a view
  const view = new URLSearchParams(location.hash.slice(1));
  state.source = view.get("source") ?? "";
  state.q = search.value = view.get("q") ?? "";
  show();
}

for (const chip of chips) chip.addEventListener("click", () => change({ source: chip.dataset.source }));
search.addEventListener("input", () => change({ q: search.value }));
document.getElementById("clear").addEventListener("click", () => {
  search.value = "";
  change({ source: "", q: "" });
  search.focus();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "/" && document.activeElement !== search) {
    event.preventDefault();
    search.focus();
  } else if (event.key === "Escape" && document.activeElement === search) {
    search.value = "";
    change({ q: "" });
  }
});
for (const node of document.querySelectorAll(".card.long")) {
  const button = document.createElement("button");
  const label = () => {
    button.textContent = node.classList.contains("open") ? "Show less" : "Show all";
    button.setAttribute("aria-expanded", String(node.classList.contains("open")));
  };
  button.type = "button";
  button.className = "plain";
  button.addEventListener("click", () => { node.classList.toggle("open"); label(); });
  label();
  node.querySelector(".caption").after(button);
}
window.addEventListener("hashchange", readAddress);
readAddress();
if (state.source || state.q) document.getElementById("gallery").scrollIntoView();
