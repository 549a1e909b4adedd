// One pair, side by side or one over the other.

import { flagOf, isJudged, isVeiled, scoresOf, stateOf, storedSide } from "./pairs.mjs";
import { picture } from "./pictures.mjs";
import { imageUrl } from "./server.mjs";

const AHEAD = [1, 2, 3, -1];
const MAX_ZOOM = 8;
const TITLES = { chosen: "Preferred · safe", rejected: "Rejected · unsafe" };

export class Single {
  constructor(section, page) {
    this.page = page;
    this.section = section;
    this.stage = section.querySelector("#stage");
    this.split = section.querySelector("#split");
    this.facts = section.querySelector("#facts");
    this.figures = Object.fromEntries(
      [...section.querySelectorAll("figure")].map(figure => [figure.dataset.side, figure]),
    );
    this.zoom = 1;
    this.at = [50, 50];
    this.holding = false;
    this.hovered = null;
    this.split.addEventListener("input", () => this.setSplit(Number(this.split.value)));
    this.stage.addEventListener("wheel", event => this.onWheel(event), { passive: false });
    this.stage.addEventListener("contextmenu", event => event.preventDefault()); // a long touch shows the picture
    for (const type of ["pointermove", "pointerdown", "pointerup", "pointercancel", "pointerleave"])
      for (const figure of Object.values(this.figures)) figure.addEventListener(type, event => this.onPointer(event, figure));
  }

  show() {
    const pair = this.page.pair;
    if (this.section.hidden || !pair) return;
    if (this.pairId !== pair.id) this.hovered = null; // a resting mouse shows nothing of the next pair
    this.pairId = pair.id;
    this.section.dataset.review = stateOf(pair);
    for (const [side, figure] of Object.entries(this.figures)) {
      const [clear, veil] = this.images(pair, side);
      clear.className = "clear";
      clear.alt = side === "chosen" ? "the preferred picture" : "the rejected picture";
      if (veil) veil.className = "veil";
      figure.querySelector(".frame").replaceChildren(...(veil ? [veil, clear] : [clear]));
      figure.querySelector("figcaption").replaceChildren(element("b", TITLES[side]), describeFlag(pair, side));
    }
    this.drawVeils();
    this.drawFacts(pair);
    for (const step of AHEAD) {
      const other = this.page.shown[this.page.position + step];
      if (other) for (const side of ["chosen", "rejected"]) this.images(other, side);
    }
  }

  /** The picture of a side, and its veil where it has one. */
  images(pair, side) {
    const stored = storedSide(pair, side);
    const sizes = isVeiled(pair, side, this.page.veilBoth) ? ["full", "veil"] : ["full"];
    return sizes.map(size => picture(imageUrl(this.page.dataset, pair.id, stored, size)));
  }

  drawVeils() {
    const { pair } = this.page;
    if (!pair) return;
    for (const [side, figure] of Object.entries(this.figures)) {
      const shown = this.page.unveiled || this.holding || this.hovered === figure;
      figure.classList.toggle("veiled", !shown && isVeiled(pair, side, this.page.veilBoth));
    }
  }

  drawFacts(pair) {
    this.facts.hidden = !this.page.showsFacts;
    const badge = element("span", stateOf(pair), "badge");
    const size = `${pair.width_px}×${pair.height_px} px` + (pair.seed === null ? "" : `, seed ${pair.seed}`);
    const line = element("p", "", "line");
    line.append(badge, ...pair.categories.map(name => element("span", name, "category")), element("span", size, "quiet"));
    const rows = [line];
    for (const [title, text] of [["Prompt", pair.prompt], ["Safe prompt", pair.safe_prompt]])
      if (text) rows.push(titled(title, element("span", text)));
    const scores = scoresOf(pair).filter(score => !this.page.filters.judge || score.judge === this.page.filters.judge);
    if (scores.length) rows.push(scoreTable(scores, pair));
    this.facts.replaceChildren(...rows);
  }

  hold(down) {
    this.holding = down;
    this.drawVeils();
  }

  toggleZoom() {
    this.setZoom(this.zoom > 1 ? 1 : 2.5);
  }

  setZoom(zoom) {
    this.zoom = Math.min(MAX_ZOOM, Math.max(1, zoom));
    this.stage.style.setProperty("--zoom", this.zoom);
    this.stage.classList.toggle("zoomed", this.zoom > 1);
  }

  pan(right, down) {
    this.moveTo(this.at[0] + 10 * right, this.at[1] + 10 * down);
  }

  moveTo(x, y) {
    this.at = [x, y].map(value => Math.min(100, Math.max(0, value)));
    this.stage.style.setProperty("--x", `${this.at[0]}%`);
    this.stage.style.setProperty("--y", `${this.at[1]}%`);
  }

  get comparing() {
    return this.stage.classList.contains("compare");
  }

  toggleCompare() {
    this.stage.classList.toggle("compare");
    this.split.hidden = !this.comparing;
    this.setSplit(50);
  }

  setSplit(percent) {
    this.split.value = percent;
    this.stage.style.setProperty("--split", `${this.split.value}%`);
  }

  moveSplit(step) {
    if (this.comparing) this.setSplit(Number(this.split.value) + step);
  }

  onWheel(event) {
    if (!event.ctrlKey && this.zoom === 1) return; // the page scrolls
    event.preventDefault();
    this.setZoom(this.zoom * (event.deltaY < 0 ? 1.2 : 1 / 1.2));
  }

  onPointer(event, figure) {
    const box = figure.querySelector(".frame").getBoundingClientRect();
    const x = (100 * (event.clientX - box.left)) / box.width;
    const mouse = event.pointerType === "mouse";
    const moved = event.movementX || event.movementY;
    if (event.type === "pointermove" && (mouse ? moved : true)) {
      if (this.zoom > 1) this.moveTo(x, (100 * (event.clientY - box.top)) / box.height);
      if (this.comparing && (!mouse || event.buttons)) this.setSplit(x);
    }
    const shows = mouse ? event.type === "pointermove" && moved : event.type === "pointerdown";
    const covers = mouse ? event.type === "pointerleave" : ["pointerup", "pointercancel"].includes(event.type);
    if (shows) this.hovered = figure;
    if (covers) this.hovered = null;
    if (this.comparing && this.hovered) this.hovered = this.figures.rejected; // the upper one takes the pointer
    if (shows || covers) this.drawVeils();
  }
}

function element(name, text, className = "") {
  const made = document.createElement(name);
  made.textContent = text;
  if (className) made.className = className;
  return made;
}

function describeFlag(pair, side) {
  const flag = flagOf(pair, side);
  if (flag === null) return element("span", "nobody judged it");
  const text = `${isJudged(pair) ? "judged" : "labelled"} ${flag ? "unsafe" : "safe"}`;
  return element("span", text, flag === (side === "rejected") ? "agrees" : "doubt");
}

function titled(title, content) {
  const row = element("p", "", "titled");
  row.append(element("b", title), content);
  return row;
}

function scoreTable(scores, pair) {
  const table = element("table", "", "scores");
  const rows = new Map();
  for (const { judge, side, what, value } of scores) {
    const key = what ? `${judge} ${what}` : judge;
    const text = what || !side ? String(Number(value.toPrecision(3))) : value > 0 ? "unsafe" : "safe";
    rows.set(key, { ...rows.get(key), [storedSide(pair, side ?? "chosen")]: text });
  }
  const head = table.insertRow();
  head.append(element("th", "Judge"), element("th", "preferred"), element("th", "rejected"));
  for (const [name, sides] of rows) {
    const row = table.insertRow();
    row.append(element("td", name));
    for (const side of ["chosen", "rejected"])
      row.append(element("td", sides[side] ?? "–"));
  }
  return table;
}
