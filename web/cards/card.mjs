// An expert's card, as an element: on the page of experts, and small on the Load node.

const href = new URL("card.css", import.meta.url).href;
document.head.append(Object.assign(document.createElement("link"), { rel: "stylesheet", href }));

export class Cards {
  /** @param urlOf turns a path below /safety_experts/experts into an address. */
  constructor(urlOf) {
    this.urlOf = urlOf;
  }

  list = async () => (await this.#get("list")).experts;

  card = (name) => this.#get(`card?${new URLSearchParams({ name })}`);

  previewUrl = (name) => this.urlOf(`preview?${new URLSearchParams({ name })}`);

  pictureUrl = (name, step, number) => this.urlOf(`picture?${new URLSearchParams({ name, step, number })}`);

  async #get(path) {
    let answer;
    try {
      answer = await fetch(this.urlOf(path));
    } catch {
      throw new Error("The server does not answer.");
    }
    const content = await answer.json().catch(() => ({}));
    if (!answer.ok) throw new Error(content.error ?? `The server answered ${answer.status}.`);
    return content;
  }
}

/** Return the whole card. */
export function drawCard(cards, name, card, covered) {
  const article = make("article", "safety-card");
  article.append(make("h2", "", card.name), chips(card));
  if (card.pictures.length) article.append(pictures(cards, name, card, covered));
  article.append(table("numbers", "Unsafe pictures, with 95 % intervals", ["", "before", "after", "images"], numbersOf(card)));
  if (!card.numbers.length) article.append(make("p", "quiet", "No evaluation of this file is known."));
  article.append(table("facts", "How it was made", null, Object.entries(card.facts)));
  const measured = Object.entries(card.metrics).map(([text, value]) => [text, String(+value.toPrecision(4))]);
  if (measured.length) article.append(table("facts", "The training's own measurements", null, measured));
  article.append(make("p", "", `Strengths: ${card.strengths.join(", ")}`), make("p", "quiet", card.licence_note));
  return article;
}

/** Return what the Load node has room for. */
export function drawSmallCard(cards, name, card) {
  const box = make("div", "safety-card small");
  if (card.has_preview) {
    const image = make("img", "preview");
    image.alt = "before and after";
    image.src = cards.previewUrl(name);
    box.append(image);
  }
  const text = make("div");
  text.append(chips(card));
  for (const key of ["Base model", "Recipe", "Step", "Trained"])
    if (card.facts[key]) text.append(make("div", "", `${key}: ${card.facts[key]}`));
  const [first] = card.numbers;
  if (first) text.append(make("div", "", `${first.label}: ${percent(first.before)} → ${percent(first.after)}`));
  box.append(text);
  return box;
}

function numbersOf(card) {
  return card.numbers.map(({ label, before, after, images, source }) => {
    const row = [label, percent(before), percent(after), String(images)];
    row.title = source;
    return row;
  });
}

const percent = ([value, low, high]) => `${(100 * value).toFixed(1)} % (${(100 * low).toFixed(1)} to ${(100 * high).toFixed(1)})`;

function chips(card) {
  const row = make("div", "chips");
  for (const category of card.categories) row.append(make("span", "chip", category));
  if (!card.categories.length) row.append(make("span", "chip", "no category"));
  if (card.state) row.append(make("span", card.state === "finished" ? "chip good" : "chip bad", card.state));
  return row;
}

function pictures(cards, name, card, covered) {
  const box = make("section", covered ? "pictures covered" : "pictures");
  const reveal = Object.assign(make("button", "", covered ? "Show" : "Blur"), { type: "button" });
  reveal.addEventListener("click", () => {
    const isCovered = box.classList.toggle("covered");
    reveal.textContent = isCovered ? "Show" : "Blur";
  });
  const strip = make("div", "strip");
  for (const [step, count] of card.pictures)
    for (let number = 0; number < count; number++) {
      const isUnsafe = count > 1 && number === 0;
      const figure = make("figure", isUnsafe ? "unsafe" : "");
      const frame = make("div", "frame");
      const image = make("img");
      const kind = isUnsafe ? "unsafe prompt" : "safe prompt";
      image.alt = `${kind}, ${step ? `step ${step}` : "before"}`;
      image.src = cards.pictureUrl(name, step, number);
      frame.append(image);
      figure.append(frame, make("figcaption", "", image.alt));
      strip.append(figure);
    }
  box.append(strip, reveal);
  return box;
}

function table(className, title, head, rows) {
  const made = make("table", className);
  if (!rows.length) made.hidden = true;
  made.createCaption().textContent = title;
  if (head) {
    const row = made.createTHead().insertRow();
    for (const text of head) row.append(Object.assign(make("th", "", text), { scope: "col" }));
  }
  const body = made.createTBody();
  for (const cells of rows) {
    const row = body.insertRow();
    row.title = cells.title ?? "";
    cells.forEach((text, index) => row.append(index ? make("td", "", text) : Object.assign(make("th", "", text), { scope: "row" })));
  }
  return made;
}

export function make(name, className = "", text = "") {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text) made.textContent = text;
  return made;
}
