// The review page in ComfyUI: a side bar tab, and a button on the nodes that have a dataset.

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

const TAB = "safety-experts-review";
const NODES = ["SafetyExpertsReviewDataset", "SafetyExpertsLoadDataset", "SafetyExpertsGeneratePairs"];
const BUTTON = "Open review page";
const MAX_STEPS_BACK = 20;

let frame = null; // of the open tab
let wanted = {}; // the query of the page when it is opened next

function pageUrl(query) {
  const theme = document.body.classList.contains("dark-theme") ? "dark" : "light";
  return api.apiURL(`/safety_experts/review/?${new URLSearchParams({ theme, ...query })}`);
}

/** The dataset a node is about: its own widget's, else that of the node its dataset comes from. */
function datasetOf(node, stepsLeft = MAX_STEPS_BACK) {
  const name = node?.widgets?.find(widget => widget.name === "dataset_name")?.value;
  if (name || !node || !stepsLeft) return name;
  const index = node.inputs?.findIndex(input => input.type === "PREFERENCE_DATASET") ?? -1;
  return datasetOf(index >= 0 ? node.getInputNode(index) : null, stepsLeft - 1) ?? node.reviewedDataset;
}

function addButton(node) {
  const button = node.addWidget("button", BUTTON, null, () => {
    const dataset = datasetOf(node);
    window.open(pageUrl(dataset ? { dataset } : {}), "_blank");
  });
  button.serialize = false; // no value of the workflow
  button.options.serialize = false;
}

function openTab(query) {
  wanted = query;
  if (frame) frame.src = pageUrl(query);
  else app.extensionManager.command.execute(`Workspace.ToggleSidebarTab.${TAB}`);
}

app.registerExtension({
  name: "SafetyExperts.Review",

  setup() {
    app.extensionManager.registerSidebarTab({
      id: TAB,
      icon: "pi pi-shield",
      title: "Safety review",
      tooltip: "Safety review: look at preference pairs",
      type: "custom",
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
    if (NODES.includes(node.comfyClass)) addButton(node);
  },

  beforeRegisterNodeDef(nodeType, nodeData) {
    if (nodeData.name !== "SafetyExpertsReviewDataset") return;
    const { onExecuted } = nodeType.prototype;
    nodeType.prototype.onExecuted = function (output) {
      onExecuted?.call(this, output);
      const [result] = output?.safety_experts_review ?? [];
      if (!result) return;
      this.reviewedDataset = result.dataset;
      const button = this.widgets?.find(widget => widget.name === BUTTON);
      if (button) button.label = `${BUTTON}: ${result.summary}`;
      if (result.open_page && result.dataset) openTab({ dataset: result.dataset });
      this.setDirtyCanvas?.(true);
    };
  },
});
