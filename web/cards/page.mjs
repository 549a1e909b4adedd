// The page of experts: those of this pack among ComfyUI's LoRAs, and the card of the chosen one.
import { Cards, drawCard, make } from "./card.mjs";

const query = new URLSearchParams(location.search);
document.documentElement.dataset.theme = query.get("theme") === "light" ? "light" : "dark";
const covered = query.get("blur") !== "off";
const cards = new Cards((path) => path);
const [search, status, list, main] = ["input", "[role=status]", "ul", "main"].map((name) => document.querySelector(name));
let experts = [];

async function open(name) {
  for (const button of list.querySelectorAll("button")) button.ariaCurrent = String(button.value === name);
  main.setAttribute("aria-busy", "true");
  try {
    main.replaceChildren(drawCard(cards, name, await cards.card(name), covered));
  } catch (error) {
    main.replaceChildren(make("p", "", error.message));
  }
  main.removeAttribute("aria-busy");
}

function show() {
  const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
  const shown = experts.filter((expert) => {
    const text = [expert.name, expert.family, expert.state, ...expert.categories].join(" ").toLowerCase();
    return words.every((word) => text.includes(word));
  });
  status.textContent = experts.length
    ? `${shown.length} of ${experts.length} experts`
    : "No expert yet: train one, or put one into ComfyUI's loras folder.";
  list.replaceChildren(
    ...shown.map((expert) => {
      const button = Object.assign(make("button"), { type: "button", value: expert.name });
      if (expert.has_preview) {
        const image = Object.assign(make("img"), { alt: "", loading: "lazy", src: cards.previewUrl(expert.name) });
        button.append(image);
      }
      const text = make("span", "", expert.name);
      const about = [expert.categories.join(", "), expert.family, expert.state].filter(Boolean).join(" · ");
      text.append(make("br"), make("small", "", about));
      button.append(text);
      button.addEventListener("click", () => open(expert.name));
      const item = make("li");
      item.append(button);
      return item;
    }),
  );
}

search.addEventListener("input", show);
try {
  experts = await cards.list();
  show();
  const wanted = query.get("expert") ?? experts[0]?.name;
  if (wanted) await open(wanted);
} catch (error) {
  status.textContent = error.message;
}
