// Before and after under one slider, the unsafe side blurred until it is asked for.
import { onExecuted, pictureUrl, register, settingOf } from "./host.js";

const NODE = "SafetyExpertsCompare";
const HEIGHT_PX = 300;
const STYLE = `
.safety-compare { display: flex; flex-direction: column; gap: 4px; width: 100%; height: 100%; min-height: ${HEIGHT_PX}px; font: 12px system-ui, sans-serif; color: var(--input-text, #ddd); }
.safety-compare .stage { --split: 50%; position: relative; flex: 1; min-height: 0; overflow: hidden; border-radius: 6px; background: var(--comfy-input-bg, #222); touch-action: none; }
.safety-compare img { position: absolute; inset: 0; width: 100%; height: 100%; object-fit: contain; user-select: none; }
.safety-compare .side { position: absolute; inset: 0; overflow: hidden; }
.safety-compare .before { clip-path: inset(0 calc(100% - var(--split)) 0 0); }
.safety-compare .after { clip-path: inset(0 0 0 var(--split)); }
.safety-compare .blurred img { filter: blur(24px); }
.safety-compare .line { position: absolute; inset: 0 auto 0 var(--split); width: 2px; background: #fff; box-shadow: 0 0 3px #000; pointer-events: none; }
.safety-compare .row { display: flex; align-items: center; gap: 6px; }
.safety-compare input { flex: 1; min-width: 0; }
.safety-compare button { min-height: 26px; padding: 0 8px; border: 1px solid var(--border-color, #555); border-radius: 4px; background: var(--comfy-input-bg, #222); color: inherit; font: inherit; cursor: pointer; }
`;

class Compare {
  constructor() {
    this.element = make("div", "safety-compare");
    this.stage = make("div", "stage");
    this.sides = Object.fromEntries(["before", "after"].map((name) => [name, make("div", `side ${name}`)]));
    this.images = Object.fromEntries(
      Object.entries(this.sides).map(([name, side]) => {
        const image = make("img");
        image.alt = name;
        image.draggable = false;
        side.append(image);
        return [name, image];
      }),
    );
    this.stage.append(this.sides.before, this.sides.after, make("div", "line"));
    this.slider = make("input");
    Object.assign(this.slider, { type: "range", min: 0, max: 100, value: 50, ariaLabel: "before or after" });
    this.reveal = make("button");
    this.number = make("button");
    this.reveal.type = this.number.type = "button";
    const row = make("div", "row");
    row.append("before", this.slider, "after", this.number, this.reveal);
    this.element.append(this.stage, row);
    this.result = null;
    this.index = 0;
    this.slider.addEventListener("input", () => this.split(this.slider.value));
    this.stage.addEventListener("pointermove", (event) => this.follow(event));
    this.stage.addEventListener("pointerdown", (event) => this.follow(event));
    this.reveal.addEventListener("click", () => this.cover(!this.covered));
    this.number.addEventListener("click", () => this.show(this.index + 1));
    this.draw();
  }

  set(result) {
    this.result = result;
    this.covered = settingOf("SafetyExperts.BlurUnsafe") ?? true;
    this.show(0);
  }

  get length() {
    return this.result ? Math.max(this.result.before.length, this.result.after.length) : 0;
  }

  show(index) {
    this.index = this.length ? index % this.length : 0;
    for (const [name, image] of Object.entries(this.images)) {
      const pictures = this.result?.[name] ?? [];
      // Covered before it is loaded, so that nothing shows for a moment.
      if (pictures.length) image.src = pictureUrl(pictures[this.index % pictures.length]);
    }
    this.draw();
  }

  cover(covered) {
    this.covered = covered;
    this.draw();
  }

  draw() {
    const unsafe = { both: ["before", "after"], neither: [] }[this.result?.unsafe_side] ?? [this.result?.unsafe_side];
    for (const [name, side] of Object.entries(this.sides))
      side.classList.toggle("blurred", this.covered !== false && unsafe.includes(name));
    this.stage.hidden = !this.result;
    this.reveal.hidden = !this.result || this.result.unsafe_side === "neither";
    this.reveal.textContent = this.covered ? "Show" : "Blur";
    this.number.hidden = this.length < 2;
    this.number.textContent = `${this.index + 1} / ${this.length}`;
    this.number.title = "Next picture";
  }

  split(percent) {
    this.slider.value = percent;
    this.stage.style.setProperty("--split", `${this.slider.value}%`);
  }

  follow(event) {
    const box = this.stage.getBoundingClientRect();
    this.split((100 * (event.clientX - box.left)) / box.width);
  }
}

function make(name, className = "") {
  const made = document.createElement(name);
  made.className = className;
  return made;
}

register({
  name: "SafetyExperts.Compare",

  setup() {
    const style = make("style");
    style.textContent = STYLE;
    document.head.append(style);
  },

  nodeCreated(node) {
    if (node.comfyClass !== NODE) return;
    node.compare = new Compare();
    node.addDOMWidget("comparison", "safety-compare", node.compare.element, {
      serialize: false,
      getMinHeight: () => HEIGHT_PX,
    });
  },

  beforeRegisterNodeDef(nodeType, nodeData) {
    if (nodeData.name !== NODE) return;
    onExecuted(nodeType, (node, { safety_experts_compare: [result] = [] }) => result && node.compare?.set(result));
  },
});
