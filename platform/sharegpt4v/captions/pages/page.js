// @ts-check
"use strict";
// One view is a set of filters and an order; it lives in the address (#source=coco&q=red), so that it can be
// sent, and so that a bar of a chart is a plain link.
document.documentElement.classList.add("js");
const list = document.getElementById("cards");
const SEARCHED = ".caption, .verdict, .meta .mono";
const nodes = /** @type {HTMLElement[]} */ ([...(list?.children ?? [])]);
const cards = nodes.map((node) => ({
  node,
  data: node.dataset,
  flags: (node.dataset.flags ?? "").split(" "),
  text: [...node.querySelectorAll(SEARCHED)].map((part) => part.textContent).join("\n").toLowerCase(),
}));
const search = /** @type {HTMLInputElement | null} */ (document.getElementById("search"));
const order = /** @type {HTMLSelectElement | null} */ (document.getElementById("order"));
const sourceList = /** @type {HTMLSelectElement | null} */ (document.getElementById("source"));
const NO_FILTER = { show: "", source: "", reason: "", length: "", q: "" };
const state = { ...NO_FILTER, order: "order" };

/** @param {typeof cards[number]} card @returns {boolean} */
function matches({ data, flags, text }) {
  const [low, high] = state.length.split("-");
  const inside = !state.length || (!flags.includes("rejected") && Number(data.characters) >= Number(low)
    && Number(data.characters) <= Number(high || Infinity));
  return inside && (!state.show || flags.includes(state.show)) && (!state.source || data.source === state.source)
    && (!state.reason || data.reason === state.reason) && text.includes(state.q.trim().toLowerCase());
}

function show() {
  let shown = 0;
  for (const card of cards) {
    const visible = matches(card);
    card.node.hidden = !visible;
    shown += Number(visible);
  }
  for (const [id, value] of [["kinds", state.show], ["sources", state.source]])
    for (const chip of document.querySelectorAll(`#${id} button`))
      chip.setAttribute("aria-pressed", String(/** @type {HTMLElement} */ (chip).dataset.value === value));
  if (sourceList) sourceList.value = state.source;
  const count = document.getElementById("count");
  if (count) count.textContent = `${shown} of ${cards.length} shown`;
  const nothing = document.getElementById("nothing");
  if (nothing) nothing.hidden = shown > 0;
  showNarrowed();
  highlight(state.q.trim().toLowerCase());
}

// Filters that come from a bar have no chip of their own: each gets one that takes it away again.
function showNarrowed() {
  const words = { length: `${state.length.replace(/-$/, " or more")} characters`, reason: state.reason };
  const buttons = Object.entries(words).filter(([key]) => state[key]).map(([key, text]) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = `${text} ×`;
    button.setAttribute("aria-label", `Remove the filter ${text}`);
    button.setAttribute("aria-pressed", "true");
    button.addEventListener("click", () => change({ [key]: "" }));
    return button;
  });
  document.getElementById("narrowed")?.replaceChildren(...buttons);
}

// Sorts by a number of each card, "-" for descending; cards without it come last.
function sort() {
  const key = state.order.replace("-", "");
  const sign = state.order.startsWith("-") ? -1 : 1;
  /** @param {typeof cards[number]} card */
  const value = ({ data }) => (data[key] === undefined ? Infinity : sign * Number(data[key]));
  cards.sort((a, b) => value(a) - value(b) || Number(a.data.order) - Number(b.data.order));
  list?.append(...cards.map((card) => card.node));
}

// Marks the matches without touching the captions' nodes; browsers without the interface just filter.
/** @param {string} q */
function highlight(q) {
  if (!window.Highlight) return;
  CSS.highlights.delete("found");
  if (!q) return;
  const ranges = [];
  const parts = cards.filter(({ node }) => !node.hidden).flatMap(({ node }) => [...node.querySelectorAll(SEARCHED)]);
  for (const part of parts) {
    const walker = document.createTreeWalker(part, NodeFilter.SHOW_TEXT);
    for (let text = walker.nextNode(); text; text = walker.nextNode()) {
      const lower = (text.nodeValue ?? "").toLowerCase();
      if (lower.length !== text.nodeValue?.length) continue;
      for (let at = lower.indexOf(q); at >= 0; at = lower.indexOf(q, at + q.length)) {
        const range = new Range();
        range.setStart(text, at);
        range.setEnd(text, at + q.length);
        ranges.push(range);
      }
    }
  }
  CSS.highlights.set("found", new Highlight(...ranges));
}

/** @param {Partial<typeof state>} part */
function change(part) {
  const sorted = part.order !== undefined && part.order !== state.order;
  Object.assign(state, part);
  const chosen = Object.entries(state).filter(([key, value]) => value && !(key === "order" && value === "order"));
  const view = new URLSearchParams(chosen).toString();
  history.replaceState(null, "", view ? "#" + view : location.pathname + location.search);
  if (sorted) sort();
  show();
}

/** @returns {boolean} whether the address names a view, and not a place in the page */
function readAddress() {
  const named = location.hash.includes("=");
  if (location.hash && !named) return false;
  const view = new URLSearchParams(location.hash.slice(1));
  for (const key of Object.keys(NO_FILTER)) state[key] = view.get(key) ?? "";
  const wanted = view.get("order") ?? "order";
  state.order = [...(order?.options ?? [])].some((option) => option.value === wanted) ? wanted : "order";
  if (search) search.value = state.q;
  if (order) order.value = state.order;
  sort();
  show();
  return named;
}

function goToGallery() {
  const gallery = document.getElementById("gallery");
  gallery?.focus({ preventScroll: true });
  gallery?.scrollIntoView();
}

for (const [id, key] of [["kinds", "show"], ["sources", "source"]])
  for (const chip of document.querySelectorAll(`#${id} button`))
    chip.addEventListener("click", () => change({ [key]: /** @type {HTMLElement} */ (chip).dataset.value ?? "" }));
search?.addEventListener("input", () => change({ q: search.value }));
order?.addEventListener("change", () => change({ order: order.value }));
sourceList?.addEventListener("change", () => change({ source: sourceList.value }));
document.getElementById("clear")?.addEventListener("click", () => {
  if (search) search.value = "";
  change(NO_FILTER);
  search?.focus();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "/" && search && !viewer.open && !document.activeElement?.matches("input, select")) {
    event.preventDefault();
    search.focus();
  } else if (event.key === "Escape" && document.activeElement === search && search) {
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
  node.querySelector(".text")?.append(button);
}

// The enlarged picture: one dialog that walks through the pictures shown in the same list.
const viewer = /** @type {HTMLDialogElement} */ (document.getElementById("viewer"));
/** @type {HTMLElement[]} */
let pictures = [];
let current = 0;

/** @param {number} index */
function enlarge(index) {
  current = (index + pictures.length) % pictures.length;
  const card = pictures[current].closest(".card");
  const picture = /** @type {HTMLImageElement} */ (document.getElementById("viewer-picture"));
  picture.src = pictures[current].querySelector("img")?.src ?? "";
  const texts = [...(card?.querySelectorAll(":scope > .text > :not(button), :scope > .meta") ?? [])];
  document.getElementById("viewer-text")?.replaceChildren(...texts.map((text) => text.cloneNode(true)));
  const place = document.getElementById("viewer-place");
  if (place) place.textContent = `${current + 1} of ${pictures.length}`;
  viewer.scrollTop = 0;
}

document.addEventListener("click", (event) => {
  const button = event.target instanceof Element ? event.target.closest(".zoom") : null;
  if (!button) return;
  const within = button.closest("ul");
  pictures = [.../** @type {NodeListOf<HTMLElement>} */ (within?.querySelectorAll(".card:not([hidden]) .zoom") ?? [])];
  enlarge(pictures.findIndex((picture) => picture === button));
  viewer.showModal();
});
viewer.addEventListener("keydown", (event) => {
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (step) {
    event.preventDefault();
    enlarge(current + step);
  }
});
viewer.addEventListener("click", (event) => { if (event.target === viewer) viewer.close(); });
viewer.addEventListener("close", () => pictures[current]?.focus());
document.getElementById("viewer-previous")?.addEventListener("click", () => enlarge(current - 1));
document.getElementById("viewer-next")?.addEventListener("click", () => enlarge(current + 1));
document.getElementById("viewer-close")?.addEventListener("click", () => viewer.close());

window.addEventListener("hashchange", () => { if (readAddress()) goToGallery(); });
if (readAddress()) goToGallery();
