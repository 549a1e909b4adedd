// The review page in ComfyUI: a side bar tab, and a button on the nodes that have a dataset.
import { addButton, addSidebarTab, isDark, onExecuted, redraw, register, toggleSidebarTab, urlOf } from "./host.js";

const TAB = "safety-experts-review";
const NODES = ["SafetyExpertsReviewDataset", "SafetyExpertsLoadDataset", "SafetyExpertsGeneratePairs"];
const BUTTON = "Open review page";
const MAX_STEPS_BACK = 20;

let frame = null; // of the open tab
let wanted = {}; // the query of the page when it is opened next

function pageUrl(query) {
  return urlOf(`/safety_experts/review/?${new URLSearchParams({ theme: isDark() ? "dark" : "light", ...query })}`);
}

/** The dataset a node is about: its own widget's, else that of the node its dataset comes from. */
function datasetOf(node, stepsLeft = MAX_STEPS_BACK) {
  const name = node?.widgets?.find((widget) => widget.name === "dataset_name")?.value;
  if (name || !node || !stepsLeft) return name;
  const index = node.inputs?.findIndex((input) => input.type === "PREFERENCE_DATASET") ?? -1;
  return datasetOf(index >= 0 ? node.getInputNode(index) : null, stepsLeft - 1) ?? node.reviewedDataset;
}

function openPage(node) {
  const dataset = datasetOf(node);
  window.open(pageUrl(dataset ? { dataset } : {}), "_blank");
}

function openTab(query) {
  wanted = query;
  if (frame) frame.src = pageUrl(query);
  else toggleSidebarTab(TAB);
}

function showResult(node, { dataset, summary, open_page: opens }) {
  node.reviewedDataset = dataset;
  const button = node.widgets?.find((widget) => widget.name === BUTTON);
  if (button) button.label = `${BUTTON}: ${summary}`;
  if (opens && dataset) openTab({ dataset });
  redraw();
}

register({
  name: "SafetyExperts.Review",

  setup() {
    addSidebarTab({
      id: TAB,
      icon: "pi pi-shield",
      title: "Safety review",
      tooltip: "Safety review: look at preference pairs",
      render(container) {
        frame = document.createElement("iframe");
        frame.title = "Safety review";
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
    if (NODES.includes(node.comfyClass)) addButton(node, BUTTON, () => openPage(node));
  },

  beforeRegisterNodeDef(nodeType, nodeData) {
    if (nodeData.name !== "SafetyExpertsReviewDataset") return;
    onExecuted(nodeType, (node, { safety_experts_review: [result] = [] }) => result && showResult(node, result));
  },
});
