// The training panel in ComfyUI: in the Train node, and as a tab of the bottom panel. What it is made of is loaded when
// a panel is first shown (web/training/).
import { addElement, addPanel, hideLivePicture, isDark, onEvent, onExecuted, onTheme, register, settingOf, urlOf } from "./host.js";

const NODE = "SafetyExpertsTrain";
const [WIDTH_PX, HEIGHT_PX] = [320, 310];
const open = new Set(); // the panels there are

/** Return an element that becomes a panel. */
function makePanel(layout, choose) {
  const holder = document.createElement("div");
  holder.style.cssText = `width: 100%; height: 100%; ${layout === "node" ? `min-height: ${HEIGHT_PX}px` : ""}`;
  holder.ready = import("./training/panel.mjs").then(({ RunPanel }) => {
    const panel = new RunPanel({
      urlOf: (path) => urlOf(`/safety_experts/run/${path}`),
      layout,
      choose,
      blurs: () => settingOf("SafetyExperts.BlurUnsafe") ?? true,
      isTold: true,
      theme: () => (isDark() ? "dark" : "light"),
    });
    holder.replaceChildren(panel.element);
    open.add(panel);
    colour(panel);
    return panel;
  });
  return holder;
}

function colour(panel) {
  panel.element.classList.toggle("light", !isDark());
  panel.charts.draw();
}

/** The run that a node shows: its own that goes on, else the newest of its name. */
function runOf(node, runs) {
  const name = node.widgets?.find((widget) => widget.name === "expert_name")?.value?.trim() ?? "";
  const own = runs.filter((run) => run.name.startsWith(`${name}_`) && /^\d+_$/.test(run.name.slice(name.length + 1)));
  return (runs.find((run) => run.is_active && node.safetyRun === run.name) ?? own.find((run) => run.is_active) ?? own[0])?.name;
}

register({
  name: "SafetyExperts.Training",

  bottomPanelTabs: [
    addPanel("safety-experts-training", "Safety training", () =>
      makePanel("panel", (runs) => (runs.find((run) => run.is_active) ?? runs[0])?.name),
    ),
  ],

  setup() {
    onEvent("safety_experts.run", () => open.forEach((panel) => panel.pin(undefined)));
    onTheme(() => open.forEach(colour));
  },

  nodeCreated(node) {
    if (node.comfyClass !== NODE) return;
    const holder = makePanel("node", (runs) => runOf(node, runs));
    node.safetyPanel = holder;
    addElement(node, "training", holder, HEIGHT_PX);
    node.setSize([Math.max(node.size[0], WIDTH_PX), node.size[1]]);
    hideLivePicture(node);
    const { onRemoved } = node;
    node.onRemoved = function () {
      onRemoved?.call(this);
      holder.ready.then((panel) => {
        open.delete(panel);
        panel.destroy();
      });
    };
  },

  beforeRegisterNodeDef(nodeType, nodeData) {
    if (nodeData.name !== NODE) return;
    onExecuted(nodeType, (node, { safety_experts_run: [shown] = [] }) => {
      if (!shown) return;
      node.safetyRun = shown.run;
      node.safetyPanel?.ready.then((panel) => panel.pin(shown.run));
    });
  },
});
