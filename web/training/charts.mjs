// Four small charts of a training on one time axis: hover shows the values of a step in all of them.
import uPlot from "./uplot.mjs";

const CURVES = [
  { title: "Preference loss", metric: "loss/preference", heldOut: "eval/loss", colour: "--run-orange" },
  { title: "Margin", metric: "rewards/margins", heldOut: "eval/rewards/margins", colour: "--run-blue" },
  { title: "Accuracy", metric: "rewards/accuracies", heldOut: "eval/rewards/accuracies", colour: "--run-green", range: [0, 1] },
  { title: "Drift", metric: "drift", heldOut: "eval/drift", colour: "--run-purple" },
];
const REDIRECT_CURVES = [
  { title: "Residual", metric: "redirect/residual", heldOut: "eval/residual", colour: "--run-orange" },
  { title: "Leak", metric: "redirect/leak", heldOut: "eval/leak", colour: "--run-purple" },
  { title: "Weight of the leak", metric: "redirect/leak_weight", colour: "--run-blue" },
  { title: "Loss", metric: "loss", heldOut: "eval/loss", colour: "--run-green" },
];

/** Exponential moving average without the pull of its start: share `s` of what was before, in 0..1. */
export function smooth(values, s) {
  let sum = 0;
  let weight = 0;
  return values.map((value) => {
    if (value == null) return null;
    sum = s * sum + (1 - s) * value;
    weight = s * weight + (1 - s);
    return sum / weight;
  });
}

export class Charts {
  /** @param element is filled with the charts; its CSS variables give the colours. */
  constructor(element) {
    this.element = element;
    this.rows = [];
    this.smoothing = 0.6;
    this.charts = [];
    this.sync = uPlot.sync(`safety-run-${Math.random()}`);
    this.observer = new ResizeObserver(() => this.#fit());
    this.observer.observe(element);
  }

  /** Take the metrics of every step, first step first. */
  set(rows) {
    const curves = rows.some((row) => "redirect/residual" in row) ? REDIRECT_CURVES : CURVES;
    if (curves !== this.curves) this.#build(curves);
    this.rows = rows;
    this.draw();
  }

  draw() {
    const steps = this.rows.map((_, index) => index + 1);
    for (const { plot, curve } of this.charts) {
      const values = this.rows.map((row) => row[curve.metric] ?? null);
      const heldOut = this.rows.map((row) => row[curve.heldOut] ?? null);
      plot.setData([steps, values, smooth(values, this.smoothing), heldOut]);
    }
    this.#say(null);
  }

  destroy() {
    this.observer.disconnect();
    for (const { plot } of this.charts) plot.destroy();
    this.charts = [];
  }

  #build(curves) {
    for (const { plot } of this.charts) plot.destroy();
    this.element.replaceChildren();
    this.curves = curves;
    this.charts = curves.map((curve) => {
      const box = document.createElement("figure");
      const caption = document.createElement("figcaption");
      box.append(caption);
      this.element.append(box);
      const plot = new uPlot(this.#options(curve), [[], [], [], []], box);
      return { plot, curve, box, caption };
    });
    this.#fit();
  }

  #options(curve) {
    const css = (name) => getComputedStyle(this.element).getPropertyValue(name).trim() || "#888";
    const axis = {
      stroke: () => css("--run-quiet"),
      grid: { stroke: () => css("--run-line"), width: 1 },
      ticks: { show: false },
      font: "11px system-ui, sans-serif",
    };
    const line = { spanGaps: true, points: { show: false } };
    return {
      width: 200,
      height: 100,
      legend: { show: false },
      scales: { x: { time: false }, y: curve.range ? { range: curve.range } : {} },
      axes: [
        { ...axis, size: 22, gap: 2, values: (_, ticks) => ticks.map((tick) => (Number.isInteger(tick) ? tick : "")) },
        { ...axis, size: 46, gap: 2, space: 24, values: (_, ticks) => ticks.map((tick) => String(+tick.toPrecision(3))) },
      ],
      series: [
        {},
        { ...line, stroke: () => `color-mix(in srgb, ${css(curve.colour)} 35%, transparent)`, width: 1 },
        { ...line, stroke: () => css(curve.colour), width: 2 },
        { ...line, stroke: () => css("--run-text"), width: 1, dash: [3, 3], points: { show: true, size: 6, fill: () => css("--run-text") } },
      ],
      cursor: {
        y: false,
        drag: { x: true, y: false },
        sync: { key: this.sync.key },
        // On ComfyUI's canvas the node is scaled, and the pointer with it.
        move: (plot, left, top) => {
          const scale = plot.over.getBoundingClientRect().width / plot.over.offsetWidth || 1;
          return [left / scale, top / scale];
        },
      },
      hooks: { setCursor: [(plot) => this.#say(plot.cursor.idx)] },
    };
  }

  /** Write the values of a step, or the latest, beside the charts' titles. */
  #say(index) {
    for (const { plot, curve, caption } of this.charts) {
      const [, values, smoothed, heldOut] = plot.data;
      const at = index ?? values.length - 1;
      const text = (value) => (value == null ? "–" : String(+value.toPrecision(3)));
      const parts = [text(values[at]), `smoothed ${text(smoothed[at])}`];
      const last = heldOut.findLastIndex((value, place) => value != null && place <= at);
      if (last >= 0) parts.push(`held out ${text(heldOut[last])}`);
      caption.textContent = curve.title;
      const numbers = document.createElement("span");
      numbers.textContent = values.length ? `${index == null ? "" : `step ${at + 1}: `}${parts.join(", ")}` : "";
      caption.append(numbers);
    }
  }

  #fit() {
    for (const { plot, box, caption } of this.charts) {
      const width = box.clientWidth;
      const height = box.clientHeight - caption.offsetHeight;
      if (width > 60 && height > 30) plot.setSize({ width, height });
    }
  }
}
