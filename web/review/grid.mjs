// The grid: only the rows on the screen exist, so thousands of pairs scroll as lightly as ten.

import { isVeiled, stateOf, storedSide } from "./pairs.mjs";
import { imageUrl } from "./server.mjs";

const MIN_CELL_PX = 230;
const CELL_RATIO = 0.5; // of two square thumbnails side by side
const LABEL_PX = 30;
const GAP_PX = 10;
const SPARE_ROWS = 2;
const SETTLED_MS = 50; // what scrolls by faster loads no pictures

export class Grid {
  constructor(scroller, rows, page) {
    Object.assign(this, { scroller, rows, page });
    this.cells = new Map(); // position -> element
    scroller.addEventListener("scroll", () => this.draw(SETTLED_MS), { passive: true });
    new ResizeObserver(() => this.refresh()).observe(scroller);
    scroller.addEventListener("click", event => this.onClick(event));
    for (const type of ["pointerover", "pointerout", "pointerdown", "pointerup", "pointercancel"])
      scroller.addEventListener(type, event => this.onPointer(event));
  }

  get columns() {
    return Math.max(1, Math.floor((this.width + GAP_PX) / (MIN_CELL_PX + GAP_PX)));
  }

  get width() {
    return this.scroller.clientWidth - 2 * GAP_PX;
  }

  /** Draw everything anew: other pairs, another size, another blur. */
  refresh() {
    if (this.scroller.hidden || this.width <= 0) return;
    const columns = this.columns;
    this.cellWidth = Math.floor((this.width - (columns - 1) * GAP_PX) / columns);
    this.cellHeight = Math.floor(this.cellWidth * CELL_RATIO) + LABEL_PX;
    const numRows = Math.ceil(this.page.shown.length / columns);
    this.rows.style.height = `${numRows * (this.cellHeight + GAP_PX) + GAP_PX}px`;
    this.rows.replaceChildren();
    this.cells.clear();
    this.draw();
  }

  draw(delayMs = 0) {
    if (this.scroller.hidden) return;
    const rowHeight = this.cellHeight + GAP_PX;
    const firstRow = Math.max(0, Math.floor(this.scroller.scrollTop / rowHeight) - SPARE_ROWS);
    const lastRow = Math.ceil((this.scroller.scrollTop + this.scroller.clientHeight) / rowHeight) + SPARE_ROWS;
    const first = firstRow * this.columns;
    const last = Math.min(this.page.shown.length, lastRow * this.columns);
    for (const [position, cell] of this.cells)
      if (position < first || position >= last) {
        cell.remove();
        this.cells.delete(position);
      }
    for (let position = first; position < last; position++) if (!this.cells.has(position)) this.add(position, delayMs);
    this.mark();
  }

  add(position, delayMs) {
    const cell = document.createElement("div");
    cell.className = "cell";
    cell.id = `pair-${position}`;
    cell.setAttribute("role", "option");
    cell.style.width = `${this.cellWidth}px`;
    cell.style.height = `${this.cellHeight}px`;
    cell.style.left = `${GAP_PX + (position % this.columns) * (this.cellWidth + GAP_PX)}px`;
    cell.style.top = `${GAP_PX + Math.floor(position / this.columns) * (this.cellHeight + GAP_PX)}px`;
    cell.dataset.position = position;
    this.cells.set(position, cell);
    this.rows.append(cell);
    const fill = () => cell.isConnected && this.fill(cell, this.page.shown[position]);
    if (delayMs) setTimeout(fill, delayMs);
    else fill();
  }

  fill(cell, pair) {
    const state = stateOf(pair);
    cell.dataset.review = state;
    cell.setAttribute("aria-label", `${pair.categories.join(", ")}: ${state}`);
    const thumbnails = document.createElement("div");
    thumbnails.className = "thumbnails";
    for (const side of ["chosen", "rejected"]) {
      const image = document.createElement("img");
      const veiled = !this.page.unveiled && isVeiled(pair, side, this.page.veilBoth);
      image.alt = "";
      image.draggable = false;
      image.dataset.side = side;
      image.classList.toggle("veiled", veiled);
      image.src = this.url(pair, side, veiled);
      thumbnails.append(image);
    }
    const label = document.createElement("div");
    label.className = "label";
    const badge = document.createElement("span");
    badge.className = "badge";
    badge.textContent = state;
    label.append(badge, pair.categories.join(", "));
    cell.replaceChildren(thumbnails, label);
  }

  url(pair, side, veiled) {
    return imageUrl(this.page.dataset, pair.id, storedSide(pair, side), veiled ? "veil" : "thumbnail");
  }

  /** Draw one pair anew after a decision. */
  update(position) {
    const cell = this.cells.get(position);
    if (cell) this.fill(cell, this.page.shown[position]);
  }

  mark() {
    for (const [position, cell] of this.cells) cell.setAttribute("aria-selected", position === this.page.position);
    this.scroller.setAttribute("aria-activedescendant", `pair-${this.page.position}`);
  }

  /** Bring the pair at hand into sight. */
  show() {
    if (this.scroller.hidden) return;
    const top = Math.floor(this.page.position / this.columns) * (this.cellHeight + GAP_PX);
    const bottom = top + this.cellHeight + 2 * GAP_PX;
    if (top < this.scroller.scrollTop) this.scroller.scrollTop = top;
    else if (bottom > this.scroller.scrollTop + this.scroller.clientHeight)
      this.scroller.scrollTop = bottom - this.scroller.clientHeight;
    this.draw();
  }

  /** Show or cover the veiled thumbnails of the pair at hand. */
  reveal(shown, position = this.page.position) {
    for (const image of this.cells.get(position)?.querySelectorAll("img.veiled") ?? []) this.cover(image, shown);
  }

  cover(image, shown) {
    const pair = this.page.shown[image.closest(".cell").dataset.position];
    image.src = this.url(pair, image.dataset.side, !shown);
  }

  onPointer(event) {
    const image = event.target.closest?.("img.veiled");
    if (!image) return;
    const mouse = event.pointerType === "mouse";
    if (event.type === "pointerover" && mouse) this.cover(image, true);
    if (event.type === "pointerdown" && !mouse) this.cover(image, true);
    if (event.type === "pointerout" || (["pointerup", "pointercancel"].includes(event.type) && !mouse))
      this.cover(image, false);
  }

  onClick(event) {
    const cell = event.target.closest(".cell");
    if (!cell) return;
    this.page.go(Number(cell.dataset.position));
    if (event.detail === 2 || event.pointerType === "touch") this.page.setView("single");
  }
}
