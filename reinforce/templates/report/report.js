// The report works without this script. It adds the switch of colours, and the tabs and the search of the gallery.
"use strict";

const PAGE = 24; // samples that are shown at first, and added by "Show more"
const FOUND = 200; // samples without picture that are listed

// Stored values are lost where a browser refuses storage, as some do for files.
const store = {
  get(name) { try { return localStorage.getItem(name); } catch { return null; } },
  set(name, value) { try { localStorage.setItem(name, value); } catch { /* not kept */ } },
};

const chosen = store.get("reinforce-theme");
if (chosen === "dark" || chosen === "light") document.documentElement.dataset.theme = chosen;

const inspection = {
  rows: [],
  waiting: 0,
  // Called by the files data/rows-N.js with [row, key, shard, texts] of each sample that was looked at.
  add(entries) {
    for (const [row, key, shard, texts] of entries) {
      const words = [key, ...texts.filter((text) => text !== null)].join("\n").toLowerCase();
      this.rows.push({ row, key, shard, texts, words });
    }
  },
};

function isDark() {
  const theme = document.documentElement.dataset.theme;
  return theme ? theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

function switchColours() {
  const button = document.getElementById("theme");
  const show = () => button.setAttribute("aria-pressed", String(isDark()));
  button.addEventListener("click", () => {
    document.documentElement.dataset.theme = isDark() ? "light" : "dark";
    store.set("reinforce-theme", document.documentElement.dataset.theme);
    show();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", show);
  button.hidden = false;
  show();
}

// Load the texts of all samples once; call `done` with every part.
function loadTexts(parts, done) {
  if (inspection.loading) return;
  inspection.loading = true;
  inspection.waiting = parts;
  for (let part = 0; part < parts; part++) {
    const script = document.createElement("script");
    script.src = `data/rows-${part}.js`;
    script.onload = script.onerror = () => { inspection.waiting--; done(); };
    document.head.append(script);
  }
}

function element(name, text, attributes = {}) {
  const made = document.createElement(name);
  made.textContent = text;
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

function gallery() {
  const box = document.getElementById("cards");
  if (!box) return;
  const order = ["by", "down", "least", "most"].map((id) => document.getElementById(id)).filter(Boolean);
  const [by, down, least, most] = order;
  const [form, query, status, more, nothing, found, list] =
    [".controls", "#query", "#status", "#more", "#nothing", "#found", "#found-list"].map((s) => document.querySelector(s));
  const cards = [...box.querySelectorAll(".card")];
  const pictured = new Set(cards.map((card) => card.dataset.row));
  let shown = PAGE;

  const tab = () => form.elements.tab.value;
  const value = (input) => (input === down ? (down.checked ? "1" : "") : input.value);
  const inTab = () => cards
    .filter((card) => tab() in card.dataset)
    .sort((a, b) => a.dataset[tab()] - b.dataset[tab()]);

  // The chosen number of a card, NaN where it has none.
  const number = (card) => Number.parseFloat((card.dataset.numbers ?? "").split(" ")[by?.value || 0] ?? "");

  // Cards within the range of the chosen number, in its order.
  function arranged(found) {
    if (!by?.value) return found;
    const [low, high] = [least, most].map((input) => Number.parseFloat(input.value));
    const within = found.filter((card) => !(Number.isNaN(number(card)) || number(card) < low || number(card) > high));
    return within.sort((a, b) => (down.checked ? number(b) - number(a) : number(a) - number(b)));
  }

  function matches(words) {
    const texts = new Map(inspection.rows.map((row) => [String(row.row), row.words]));
    return (card) => {
      const text = texts.get(card.dataset.row) ?? card.textContent.toLowerCase();
      return words.every((word) => text.includes(word));
    };
  }

  function listOthers(words) {
    const listed = words.length && !by?.value
      ? inspection.rows.filter((row) => !pictured.has(String(row.row)) && words.every((word) => row.words.includes(word)))
      : [];
    list.replaceChildren(...listed.slice(0, FOUND).map((row) => {
      const item = document.createElement("li");
      item.append(element("b", row.key), " ", element("small", row.shard));
      for (const text of row.texts) if (text !== null) item.append(element("span", text, { dir: "auto" }));
      return item;
    }));
    found.hidden = !listed.length;
    return listed.length;
  }

  function update() {
    const words = query.value.toLowerCase().split(/\s+/).filter(Boolean);
    const fits = arranged((words.length ? cards : inTab()).filter(matches(words))); // words are searched in all tabs
    cards.forEach((card) => { card.hidden = true; });
    fits.slice(0, shown).forEach((card) => { card.hidden = false; });
    box.prepend(...fits); // the order of the page is the order of the keyboard
    more.hidden = fits.length <= shown;
    const others = listOthers(words);
    nothing.hidden = fits.length + others > 0;
    for (const input of [down, least, most]) if (input) input.disabled = !by.value;
    const text = form.querySelector("input[name=tab]:checked").dataset.text;
    const loading = inspection.waiting ? " Texts are being loaded." : "";
    status.textContent = words.length
      ? `${fits.length} with a picture${others ? `, ${others} without` : ""}.${loading}`
      : `${by?.value ? `${fits.length} with this number. ` : ""}${text} ${fits.length > shown ? `${shown} of ${fits.length} are shown.` : ""}`;
    const state = new URLSearchParams({ tab: tab(), ...(query.value ? { q: query.value } : {}) });
    if (by?.value) for (const input of order) if (value(input)) state.set(input.id, value(input));
    if (!location.hash.startsWith("#s") || words.length) history.replaceState(null, "", `#${state}`);
  }

  function changed() {
    shown = PAGE;
    if (query.value) loadTexts(Number(query.dataset.parts), update);
    update();
  }

  function readAddress() {
    const address = location.hash.slice(1);
    const card = /^[sq]\d+$/.test(address) ? document.getElementById(address) : null;
    const state = new URLSearchParams(card ? "" : address);
    const wanted = card ? (card.dataset.key !== undefined ? "key" : "quarantine") : state.get("tab");
    const input = [...form.elements.tab].find((one) => one.value === wanted && !one.disabled);
    if (input) input.checked = true;
    query.value = state.get("q") ?? "";
    for (const input of order) input[input === down ? "checked" : "value"] = state.get(input.id) ?? "";
    if (card) shown = Math.max(PAGE, inTab().indexOf(card) + 1);
    return card;
  }

  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", changed);
  more.addEventListener("click", () => {
    const next = shown;
    shown += PAGE;
    update();
    box.children[next]?.querySelector("a")?.focus();
  });
  window.addEventListener("hashchange", () => { const card = readAddress(); update(); card?.scrollIntoView(); });
  form.hidden = status.hidden = false;
  const card = readAddress();
  if (query.value) loadTexts(Number(query.dataset.parts), update);
  update();
  card?.scrollIntoView();

  // The crop of the augmentation under the pointer stands out.
  const light = (replay, on) => {
    const owner = replay.closest(".card");
    owner.classList.toggle("lit", on);
    owner.querySelectorAll(".crop")[replay.dataset.replay]?.classList.toggle("on", on);
  };
  for (const [type, on] of [["mouseover", true], ["mouseout", false]]) {
    box.addEventListener(type, (event) => {
      const replay = event.target.closest(".replay");
      if (replay) light(replay, on);
    });
  }
}

document.addEventListener("DOMContentLoaded", () => { switchColours(); gallery(); });
