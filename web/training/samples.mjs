// What was drawn while training: one step by a slider, or every step and prompt as a matrix; unsafe prompts blurred.

export class Samples {
  constructor(server, { isCompact = false, blurs = () => true } = {}) {
    this.server = server;
    this.covered = blurs();
    this.element = make("section", "samples");
    this.element.setAttribute("aria-label", "Samples");
    this.slider = Object.assign(make("input"), { type: "range", min: 0, step: 1, ariaLabel: "Step of the samples" });
    this.label = make("output");
    this.reveal = button("Show", "Show what is drawn for the unsafe prompt", () => this.#cover(!this.covered));
    this.all = button("All steps", "Every step and prompt", () => this.#switch());
    this.all.hidden = isCompact;
    this.view = make("div", "view");
    const row = make("div", "row");
    row.append(this.slider, this.label, this.reveal, this.all);
    this.element.append(row, this.view);
    this.slider.addEventListener("input", () => {
      this.follows = Number(this.slider.value) === this.steps.length - 1;
      this.#draw();
    });
    this.clear();
  }

  clear() {
    this.run = "";
    this.steps = [];
    this.follows = true; // the latest step, as it comes
    this.isMatrix = false;
    this.#draw();
  }

  /** Take [step, number of pictures] of every step that there are samples of, and the prompts. */
  set(run, steps, prompts) {
    const isSame = run === this.run && JSON.stringify(steps) === JSON.stringify(this.steps);
    if (isSame) return;
    Object.assign(this, { run, steps, prompts });
    this.slider.max = Math.max(0, steps.length - 1);
    if (this.follows) this.slider.value = this.slider.max;
    this.#draw();
  }

  #cover(covered) {
    this.covered = covered;
    this.#draw();
  }

  #switch() {
    this.isMatrix = !this.isMatrix;
    this.#draw();
  }

  #draw() {
    const isEmpty = !this.steps.length;
    this.element.classList.toggle("empty", isEmpty);
    this.element.classList.toggle("covered", this.covered);
    this.reveal.textContent = this.covered ? "Show" : "Blur";
    this.all.textContent = this.isMatrix ? "One step" : "All steps";
    this.slider.disabled = this.isMatrix || this.steps.length < 2;
    if (isEmpty) {
      this.label.textContent = "";
      this.view.textContent = "No samples yet: press Sample now, or set sample_every.";
      return;
    }
    if (this.isMatrix) this.#drawMatrix();
    else this.#drawStep();
  }

  #drawStep() {
    const [step, count] = this.steps[this.slider.value];
    this.label.textContent = nameOf(step);
    const pictures = Array.from({ length: count }, (_, number) => {
      const figure = make("figure");
      const caption = make("figcaption");
      caption.textContent = this.#kind(number, count);
      figure.append(this.#picture(step, number, count), caption);
      return figure;
    });
    const strip = make("div", "strip");
    strip.append(...pictures);
    this.view.replaceChildren(strip);
  }

  #drawMatrix() {
    this.label.textContent = `${this.steps.length} steps`;
    const table = make("table", "matrix");
    const head = table.createTHead().insertRow();
    const count = Math.max(...this.steps.map(([, each]) => each));
    for (const text of ["", ...Array.from({ length: count }, (_, number) => this.#kind(number, count))]) {
      const cell = make("th");
      cell.scope = "col";
      cell.textContent = text;
      head.append(cell);
    }
    const body = table.createTBody();
    for (const [step, each] of this.steps) {
      const row = body.insertRow();
      const name = make("th");
      name.scope = "row";
      name.textContent = nameOf(step);
      row.append(name);
      for (let number = 0; number < each; number++) row.insertCell().append(this.#picture(step, number, count));
    }
    this.view.replaceChildren(table);
  }

  #kind(number, count) {
    return count > 1 ? (number ? "safe prompt" : "unsafe prompt") : "prompt";
  }

  #picture(step, number, count) {
    const frame = make("div", count > 1 && number === 0 ? "frame unsafe" : "frame");
    const image = make("img");
    // Covered by its frame's class before it is loaded, so that nothing shows for a moment.
    image.loading = "lazy";
    image.alt = `${this.#kind(number, count)}, ${nameOf(step)}`;
    image.src = this.server.sampleUrl(this.run, step, number);
    frame.append(image);
    return frame;
  }
}

const nameOf = (step) => (step ? `step ${step}` : "before");

function make(name, className = "") {
  const made = document.createElement(name);
  if (className) made.className = className;
  return made;
}

function button(text, title, onClick) {
  const made = Object.assign(make("button"), { type: "button", textContent: text, title });
  made.addEventListener("click", onClick);
  return made;
}
