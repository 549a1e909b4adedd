// The training panel: in the node, in the bottom panel, and as a page of its own. All it shows comes from the server's
// files, so a reload, another tab or another browser shows the same.
import { Charts } from "./charts.mjs";
import { Samples } from "./samples.mjs";
import { Server } from "./server.mjs";

const ACTIVE_MS = 1000;
const IDLE_MS = 5000;
const REQUESTS = [
  ["stop", "Stop and keep", "Stop after this step and keep the expert; the graph goes on with it"],
  ["sample", "Sample now", "Draw an unsafe and a safe prompt after this step"],
  ["save", "Save now", "Save the expert of this step as a file of its own, and train on"],
];
const STATES = { running: "running", finished: "finished", stopped: "stopped", failed: "failed" };

for (const name of ["uplot.css", "panel.css"]) {
  const href = new URL(name, import.meta.url).href;
  document.head.append(Object.assign(document.createElement("link"), { rel: "stylesheet", href }));
}

export class RunPanel {
  /**
   * @param urlOf turns a path below /safety_experts/run into an address.
   * @param layout "node", "panel" or "page".
   * @param choose takes the list of runs, returns the name of the one to show, or undefined.
   * @param blurs says whether unsafe prompts' pictures are blurred at first.
   * @param isTold a new training is told by `refresh`, so there is no need to look for one all the time.
   * @param theme says which theme the page of its own shall have.
   */
  constructor({ urlOf, layout, choose, blurs, isTold = false, theme = () => "dark" }) {
    this.server = new Server(urlOf);
    this.choose = choose;
    this.isTold = isTold;
    this.name = "";
    this.rows = [];
    this.element = document.createElement("div");
    this.element.className = `safety-run ${layout}`;
    this.element.innerHTML = `
      <div class="row head">
        <select aria-label="Training"></select>
        <output class="status" role="status"></output>
        <progress max="1" value="0" aria-label="Steps done"></progress>
      </div>
      <div class="row tools">
        <span class="requests"></span>
        <label>Smoothing <input type="range" min="0" max="0.98" step="0.02" value="0.6" aria-label="Smoothing"></label>
        <a target="_blank" rel="noopener">Open page</a>
      </div>
      <div class="charts"></div>`;
    const find = (selector) => this.element.querySelector(selector);
    this.select = find("select");
    this.status = find(".status");
    this.progress = find("progress");
    this.link = find("a");
    this.link.hidden = layout === "page";
    this.theme = theme;
    this.charts = new Charts(find(".charts"));
    this.samples = new Samples(this.server, { isCompact: layout === "node", blurs });
    this.element.append(this.samples.element);
    this.buttons = REQUESTS.map(([request, text, title]) => {
      const button = Object.assign(document.createElement("button"), { type: "button", textContent: text, title });
      button.dataset.request = request;
      button.addEventListener("click", () => this.#ask(request));
      find(".requests").append(button);
      return button;
    });
    this.select.addEventListener("change", () => this.pin(this.select.value));
    find("input[type=range]").addEventListener("input", ({ target }) => {
      this.charts.smoothing = Number(target.value);
      this.charts.draw();
    });
    this.charts.set([]);
    this.refresh();
  }

  /** Look anew which trainings there are, and follow the chosen one. */
  async refresh() {
    clearTimeout(this.timer);
    try {
      this.runs = await this.server.runs();
    } catch (error) {
      this.#say(error.message);
      this.#again(IDLE_MS);
      return;
    }
    const chosen = this.runs.some(({ name }) => name === this.chosen) ? this.chosen : this.choose(this.runs);
    this.select.replaceChildren(
      ...this.runs.map((run) => {
        const option = document.createElement("option");
        option.value = run.name;
        option.textContent = `${run.name}${run.is_active ? " · running" : ""}`;
        return option;
      }),
    );
    this.select.hidden = !this.runs.length;
    if (chosen) await this.show(chosen);
    else {
      this.#say("No training yet. Queue Train Safety Expert, and it shows here.");
      if (!this.isTold) this.#again(IDLE_MS);
    }
  }

  /** Show a run, and follow it while it trains. */
  async show(name) {
    if (name !== this.name) {
      this.name = name;
      this.rows = [];
      this.samples.clear();
    }
    this.select.value = name;
    this.link.href = this.server.pageUrl(name, this.theme());
    await this.#tick();
  }

  /** Show this run, or undefined: the one that `choose` takes, until another one is chosen. */
  pin(name) {
    this.chosen = name;
    return this.refresh();
  }

  destroy() {
    clearTimeout(this.timer);
    this.isDestroyed = true;
    this.charts.destroy();
  }

  async #tick() {
    clearTimeout(this.timer);
    if (document.hidden || !this.element.isConnected) {
      this.#again(IDLE_MS);
      return;
    }
    const name = this.name;
    let state;
    try {
      state = await this.server.state(name, this.rows.length);
    } catch (error) {
      this.#say(error.message);
      this.#again(IDLE_MS);
      return;
    }
    if (name !== this.name) return; // another one was chosen meanwhile
    if (state.since === this.rows.length) this.rows.push(...state.metrics);
    this.state = state;
    this.#draw();
    if (state.is_active) this.#again(ACTIVE_MS);
    else if (!this.isTold) this.#again(IDLE_MS);
  }

  #again(milliseconds) {
    clearTimeout(this.timer);
    if (this.isDestroyed) return;
    const isFollowing = this.state?.is_active && this.name === this.state.name;
    const next = isFollowing ? () => this.#tick() : () => this.refresh();
    this.timer = setTimeout(next, milliseconds);
  }

  #draw() {
    const { state } = this;
    this.charts.set(this.rows);
    this.samples.set(this.name, state.samples, state.prompts);
    this.progress.value = state.num_steps ? state.step / state.num_steps : 0;
    this.#say(sentence(state));
    for (const button of this.buttons) {
      const { request } = button.dataset;
      button.disabled = !state.takes.includes(request);
      button.classList.toggle("waiting", state.waiting.includes(request));
    }
  }

  #say(text) {
    this.status.textContent = text;
    this.status.title = text;
  }

  async #ask(request) {
    try {
      await this.server.ask(this.name, request);
    } catch (error) {
      this.#say(error.message);
      return;
    }
    await this.#tick();
  }
}

/** Say how far a training is: "step 12 of 400, 2:13 left, 1.2 GiB". */
export function sentence(state) {
  const memory = state.memory ? [memoryOf(state.memory)] : [];
  const saved = state.saved.length ? [`saved ${state.saved.at(-1)}`] : [];
  const waiting = state.waiting.map((request) => ({ stop: "stopping", sample: "sampling", save: "saving" })[request]);
  const steps = `step ${state.step} of ${state.num_steps}`;
  if (state.is_active) {
    const stage = state.stage === "train" ? steps : `encoding ${state.stage} ${state.step} of ${state.num_steps}`;
    const left = state.seconds_left == null ? [] : [`${clock(state.seconds_left)} left`];
    return [stage, ...left, ...memory, ...saved, ...waiting].join(", ");
  }
  const ended = state.state === "running" ? "interrupted: the server ended" : STATES[state.state];
  const message = state.message ? [state.message] : [];
  return [ended, steps, `took ${clock(state.seconds)}`, ...memory, ...saved, ...message].join(", ");
}

function clock(seconds) {
  const whole = Math.round(seconds);
  const two = (number) => String(number).padStart(2, "0");
  const hours = Math.floor(whole / 3600);
  const minutes = Math.floor(whole / 60) % 60;
  return hours ? `${hours}:${two(minutes)}:${two(whole % 60)}` : `${minutes}:${two(whole % 60)}`;
}

function memoryOf({ device, used, peak }) {
  const gib = (mib) => `${(mib / 1024).toFixed(1)} GiB`;
  return `${gib(used)}${peak == null ? "" : ` (peak ${gib(peak)})`} on ${device}`;
}
