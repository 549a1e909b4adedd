// Experts' cards in ComfyUI: a side bar tab with all of them, and a small one on the Load node (drawn by web/cards/).
import { addButton, addElement, addSidebarTab, isDark, onExecuted, register, settingOf, toggleSidebarTab, urlOf } from "./host.js";

const TAB = "safety-experts-cards";
const NODE = "SafetyExpertsLoad";
const [WIDTH_PX, HEIGHT_PX] = [320, 110];

let frame = null; // of the open tab
let wanted = {}; // the query of the page when it is opened next

function pageUrl(query) {
  const blur = settingOf("SafetyExperts.BlurUnsafe") === false ? "off" : "on";
  return urlOf(`/safety_experts/experts/?${new URLSearchParams({ theme: isDark() ? "dark" : "light", blur, ...query })}`);
}

function open(expert) {
  wanted = expert ? { expert } : {};
  if (frame) frame.src = pageUrl(wanted);
  else toggleSidebarTab(TAB);
}

const nameOf = (node) => node.widgets?.find((widget) => widget.name === "expert_name")?.value;

async function drawOn(node) {
  const name = nameOf(node);
  if (!name || node.cardName === name) return;
  node.cardName = name;
  const { Cards, drawSmallCard } = await import("./cards/card.mjs");
  const cards = new Cards((path) => urlOf(`/safety_experts/experts/${path}`));
  try {
    const card = await cards.card(name);
    if (node.cardName === name) node.cardHolder.replaceChildren(drawSmallCard(cards, name, card));
  } catch (error) {
    node.cardHolder.textContent = error.message;
  }
}

register({
  name: "SafetyExperts.Cards",

  setup() {
    addSidebarTab({
      id: TAB,
      icon: "pi pi-id-card",
      title: "Safety experts",
      tooltip: "Safety experts: the cards of those you have",
      render(container) {
        frame = document.createElement("iframe");
        frame.title = "Safety experts";
        frame.style.cssText = "width: 100%; height: 100%; border: 0; display: block";
        frame.src = pageUrl(wanted);
        container.style.height = "100%";
        container.replaceChildren(frame);
      },
      destroy() {
        frame = null;
      },
    });
  },

  nodeCreated(node) {
    if (node.comfyClass !== NODE) return;
    addButton(node, "Open card", () => open(nameOf(node)));
    node.cardHolder = document.createElement("div");
    node.cardHolder.style.cssText = "width: 100%; overflow: hidden";
    addElement(node, "card", node.cardHolder, 0);
    node.setSize([Math.max(node.size[0], WIDTH_PX), node.size[1] + HEIGHT_PX]); // one of a saved workflow keeps its own
    const changed = node.onWidgetChanged;
    node.onWidgetChanged = function () {
      changed?.apply(this, arguments);
      drawOn(this);
    };
    setTimeout(() => drawOn(node)); // a workflow's values come after the node
  },

  beforeRegisterNodeDef(nodeType, nodeData) {
    if (nodeData.name === NODE) onExecuted(nodeType, drawOn);
  },
});
