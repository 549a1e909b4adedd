// What the panel asks of the server (training/watching/routes.py).

export class Server {
  /** @param {(path: string) => string} urlOf turns a path below /safety_experts/run into an address. */
  constructor(urlOf) {
    this.urlOf = urlOf;
  }

  sampleUrl = (run, step, number) => this.urlOf(`sample?${new URLSearchParams({ run, step, number })}`);

  pageUrl = (run, theme) => this.urlOf(`?${new URLSearchParams({ run, theme })}`);

  runs = async () => (await this.#get("runs")).runs;

  state = (run, since) => this.#get(`state?${new URLSearchParams({ run, since })}`);

  ask = (run, request) =>
    this.#get("ask", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ run, request }),
    });

  async #get(path, options) {
    let answer;
    try {
      answer = await fetch(this.urlOf(path), options);
    } catch {
      throw new Error("The server does not answer; the training's record is kept on its disk.");
    }
    const content = await answer.json().catch(() => ({}));
    if (!answer.ok) throw new Error(content.error ?? `The server answered ${answer.status}.`);
    return content;
  }
}
