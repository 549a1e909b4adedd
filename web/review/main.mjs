// The page: what is shown, what keys and buttons do.

import { Grid } from "./grid.mjs";
import { KEYS, actionOf, nameOf } from "./keys.mjs";
import { JUDGED_CHOICES, REVIEWS, countBy, filterPairs, isJudgedAs, judgesOf, nextUnreviewed, stateOf } from "./pairs.mjs";
import { fetchDatasets, fetchPairs, saveReview } from "./server.mjs";
import { Single } from "./single.mjs";

const byId = id => document.getElementById(id);
const filters = byId("filters");
const settings = loadSettings();

class Page {
  constructor() {
    this.dataset = "";
    this.pairs = [];
    this.shown = [];
    this.position = 0;
    this.undone = []; // [{id, review}] to go back to, the last decision last
    this.filters = {};
    this.unveiled = false; // never remembered: every visit starts covered
    this.veilBoth = settings.veilBoth ?? false;
    this.showsFacts = true;
    this.single = new Single(byId("single"), this);
    this.grid = new Grid(byId("grid"), byId("rows"), this);
    this.work = Promise.resolve(); // keys wait here, so a decision is on disk before the next one is made
  }

  get pair() {
    return this.shown[this.position];
  }

  get view() {
    return byId("grid").hidden ? "single" : "grid";
  }

  async open(dataset, pairId) {
    say("Reading the dataset …");
    this.dataset = dataset;
    this.undone = [];
    document.title = `${dataset} · Safety review`;
    this.pairs = await fetchPairs(dataset);
    fillFilters(this.pairs);
    this.filter(clearFilters());
    const known = this.shown.findIndex(pair => pair.id === pairId);
    this.go(known >= 0 ? known : Math.max(0, nextUnreviewed(this.shown, -1)));
  }

  /** Choose the pairs to show. They stay while decisions change what they are, so that none jumps away. */
  filter(chosen) {
    const at = this.pair;
    this.filters = chosen;
    this.shown = filterPairs(this.pairs, chosen);
    this.position = Math.max(0, this.shown.indexOf(at));
    const isAll = this.shown.length === this.pairs.length;
    byId("shown").textContent = isAll ? "" : `${this.shown.length} of ${this.pairs.length} pairs`;
    byId("menu").classList.toggle("on", !isAll);
    say(this.pairs.length === 0 ? "No pairs yet." : this.shown.length === 0 ? "No pair passes the filters." : "");
    this.draw();
  }

  go(position) {
    this.position = Math.min(Math.max(position, 0), Math.max(0, this.shown.length - 1));
    const query = new URLSearchParams(location.search);
    query.set("dataset", this.dataset);
    if (this.pair) query.set("pair", this.pair.id);
    history.replaceState(null, "", `?${query}`);
    this.single.show();
    this.grid.show();
    drawCounts(this);
  }

  draw() {
    this.single.show();
    this.grid.refresh();
    this.grid.show();
    drawCounts(this);
    byId("view").textContent = this.view === "grid" ? "One pair" : "Grid";
    byId("veil").textContent = this.unveiled ? "Blur is off" : "Blur is on";
    byId("veil").classList.toggle("warn", this.unveiled);
  }

  setView(view) {
    byId("grid").hidden = view !== "grid";
    byId("single").hidden = view === "grid";
    document.body.dataset.view = view;
    if (view === "grid") byId("grid").focus({ preventScroll: true });
    this.draw();
  }

  async decide(review) {
    const { pair } = this;
    if (!pair) return;
    const before = pair.review;
    await this.save(pair, review);
    this.undone.push({ id: pair.id, review: before });
    const further = this.position + 1;
    if (further < this.shown.length) this.go(further);
  }

  async undo() {
    const last = this.undone.at(-1);
    if (!last) return toast("Nothing to undo.");
    const pair = this.pairs.find(known => known.id === last.id);
    await this.save(pair, last.review);
    this.undone.pop();
    if (!this.shown.includes(pair)) this.filter(clearFilters());
    this.go(this.shown.indexOf(pair));
  }

  async save(pair, review) {
    await saveReview(this.dataset, pair.id, review);
    pair.review = review;
    this.grid.update(this.shown.indexOf(pair));
    this.single.show();
    drawCounts(this);
  }

  toUnreviewed() {
    const found = nextUnreviewed(this.shown, this.position);
    if (found < 0) toast("Every pair shown here is reviewed.");
    else this.go(found);
  }

  hold(down) {
    this.single.hold(down);
    this.grid.reveal(down || this.unveiled);
  }

  do(action) {
    const columns = this.view === "grid" ? this.grid.columns : 1;
    const actions = {
      accept: () => this.decide("accepted"),
      flip: () => this.decide("flipped"),
      drop: () => this.decide("dropped"),
      undo: () => this.undo(),
      next: () => this.go(this.position + 1),
      previous: () => this.go(this.position - 1),
      down: () => this.go(this.position + columns),
      up: () => this.go(this.position - columns),
      first: () => this.go(0),
      last: () => this.go(this.shown.length - 1),
      unreviewed: () => this.toUnreviewed(),
      hold: () => this.hold(true),
      veil: () => {
        this.unveiled = !this.unveiled;
        this.draw();
        this.single.drawVeils();
      },
      zoom: () => this.single.toggleZoom(),
      zoomIn: () => this.single.setZoom(this.single.zoom * 1.25),
      zoomOut: () => this.single.setZoom(this.single.zoom / 1.25),
      panLeft: () => this.single.pan(-1, 0),
      panRight: () => this.single.pan(1, 0),
      panUp: () => this.single.pan(0, -1),
      panDown: () => this.single.pan(0, 1),
      compare: () => this.single.toggleCompare(),
      splitLeft: () => this.single.moveSplit(-5),
      splitRight: () => this.single.moveSplit(5),
      grid: () => this.setView(this.view === "grid" ? "single" : "grid"),
      prompts: () => {
        this.showsFacts = !this.showsFacts;
        this.single.show();
      },
      filters: () => toggleFilters(),
      help: () => byId("keys").showModal(),
      close: () => this.close(),
    };
    this.work = this.work.then(actions[action]).catch(error => toast(`Not saved: ${error.message}`));
    return this.work;
  }

  close() {
    if (!byId("toast").hidden) byId("toast").hidden = true;
    else if (!filters.hidden) toggleFilters();
    else if (this.single.zoom > 1) this.single.setZoom(1);
    else if (this.single.comparing) this.single.toggleCompare();
    else this.setView("grid");
  }
}

function drawCounts(page) {
  const counts = countBy(page.pairs, pair => [stateOf(pair)]);
  const reviewed = page.pairs.length - (counts.get("unreviewed") ?? 0);
  byId("progress").max = Math.max(1, page.pairs.length);
  byId("progress").value = reviewed;
  const parts = ["accepted", "flipped", "dropped"].filter(name => counts.has(name)).map(name => `${counts.get(name)} ${name}`);
  const at = page.shown.length ? `${page.position + 1} / ${page.shown.length}` : "0";
  byId("counts").textContent = `${at} · ${reviewed} of ${page.pairs.length} reviewed` + (parts.length ? ` (${parts.join(", ")})` : "");
}

/** Fill the choices with the numbers of now. What is chosen stays chosen. */
function fillFilters(pairs) {
  const fill = (name, entries) => {
    const select = filters.elements[name];
    const { value } = select;
    const options = entries.map(([key, count, title = key]) => new Option(`${title} (${count})`, key));
    select.replaceChildren(new Option("all", ""), ...options);
    select.value = entries.some(([key]) => key === value) ? value : "";
  };
  const sorted = counts => [...counts].sort(([left], [right]) => left.localeCompare(right));
  const reviews = countBy(pairs, pair => [stateOf(pair)]);
  fill("review", REVIEWS.map(name => [name, reviews.get(name) ?? 0]));
  fill("category", sorted(countBy(pairs, pair => pair.categories)));
  fill("judge", sorted(countBy(pairs, judgesOf)));
  const judge = filters.elements.judge.value;
  const count = choice => pairs.filter(pair => isJudgedAs(pair, choice, judge)).length;
  fill("judged", JUDGED_CHOICES.map(([choice, title]) => [choice, count(choice), title]));
}

function clearFilters() {
  for (const name of ["review", "category", "judge", "judged"]) filters.elements[name].value = "";
  return {};
}

function toggleFilters() {
  filters.hidden = !filters.hidden;
  byId("menu").setAttribute("aria-expanded", !filters.hidden);
  if (filters.hidden) document.activeElement.blur();
  else {
    fillFilters(page.pairs);
    filters.elements.review.focus();
  }
}

function say(text) {
  byId("message").textContent = text;
  byId("message").hidden = !text;
}

let toastTimer;
function toast(text) {
  const box = byId("toast");
  box.textContent = text;
  box.hidden = false;
  clearTimeout(toastTimer);
  toastTimer = setTimeout(() => (box.hidden = true), 6000);
}

function loadSettings() {
  try {
    return JSON.parse(localStorage.getItem("safety-experts-review")) ?? {};
  } catch {
    return {}; // private windows have no storage
  }
}

function keepSetting(name, value) {
  settings[name] = value;
  try {
    localStorage.setItem("safety-experts-review", JSON.stringify(settings));
  } catch {
    // see loadSettings
  }
}

function applyTheme(theme) {
  if (theme) document.documentElement.dataset.theme = theme;
}

function isDark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

function listKeys() {
  const table = byId("keys").querySelector("table");
  for (const { keys, text } of KEYS.filter(entry => entry.text)) {
    const row = table.insertRow();
    const cell = row.insertCell();
    for (const key of keys) {
      const made = document.createElement("kbd");
      made.textContent = nameOf(key);
      cell.append(made, " ");
    }
    row.insertCell().textContent = text;
  }
}

function listen(page) {
  document.addEventListener("keydown", event => {
    const action = actionOf(event);
    if (!action || byId("keys").open) return;
    const { target } = event;
    if (target.matches("select, input") && action !== "close") return; // typed into a filter, not at the pairs
    if (target.matches("button") && (event.key === " " || event.key === "Enter")) return;
    event.preventDefault();
    if (action === "hold" && event.repeat) return;
    page.do(action);
  });
  document.addEventListener("keyup", event => event.key === " " && page.single.holding && page.hold(false));
  window.addEventListener("blur", () => page.hold(false));
  for (const button of document.querySelectorAll("footer button"))
    button.addEventListener("click", () => page.do(button.dataset.action));
  for (const [id, action] of [["view", "grid"], ["veil", "veil"], ["help", "help"], ["menu", "filters"]])
    byId(id).addEventListener("click", () => page.do(action));
  byId("theme").addEventListener("click", () => {
    const theme = isDark() ? "light" : "dark";
    applyTheme(theme);
    keepSetting("theme", theme);
  });
  byId("dataset").addEventListener("change", event => {
    event.target.blur();
    open(page, event.target.value);
  });
  filters.addEventListener("submit", event => event.preventDefault());
  filters.addEventListener("reset", () => setTimeout(() => page.filter(clearFilters())));
  filters.addEventListener("change", event => {
    if (event.target.name === "veilBoth") {
      page.veilBoth = event.target.checked;
      keepSetting("veilBoth", page.veilBoth);
      page.draw();
      return;
    }
    fillFilters(page.pairs);
    const { review, category, judge, judged } = filters.elements;
    page.filter({ review: review.value, category: category.value, judge: judge.value, judged: judged.value });
  });
}

async function open(page, dataset, pairId) {
  try {
    await page.open(dataset, pairId);
  } catch (error) {
    say(`Cannot open ${dataset}: ${error.message}`);
  }
}

const page = new Page();
window.reviewPage = page; // for the browser's console and the tests

async function start() {
  const query = new URLSearchParams(location.search);
  applyTheme(query.get("theme") ?? settings.theme);
  listKeys();
  listen(page);
  filters.elements.veilBoth.checked = page.veilBoth;
  page.setView(query.get("view") === "grid" ? "grid" : "single");
  let names;
  try {
    names = await fetchDatasets();
  } catch (error) {
    say(error.message);
    return;
  }
  byId("dataset").replaceChildren(...names.map(name => new Option(name, name)));
  const wanted = query.get("dataset") ?? names[0];
  if (!names.includes(wanted)) {
    byId("dataset").value = "";
    const missing = wanted === undefined ? "There is no preference dataset yet" : `There is no dataset ${wanted} yet`;
    say(`${missing}: make one with Generate Preference Pairs, then reload this page.`);
    return;
  }
  byId("dataset").value = wanted;
  await open(page, wanted, query.get("pair"));
}

start();
