// Everything this pack asks of ComfyUI's frontend, so that a change there is a change here only.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const PREFIX = "SafetyExperts";
let shown = [];

export function register(extension) {
  app.registerExtension(extension);
}

export function isOurs(nodeType) {
  return (nodeType ?? "").startsWith(PREFIX);
}

/** Show a toast and return it. Errors stay until they are closed or something is queued again. */
export function toast(severity, summary, detail) {
  const message = { severity, summary, detail, ...(severity === "error" ? {} : { life: 20000 }) };
  app.extensionManager.toast.add(message);
  shown.push(message);
  return message;
}

/** Take away toasts, by default all of this pack's. */
export function clearToasts(messages = shown) {
  for (const message of messages) app.extensionManager.toast.remove?.(message);
  shown = shown.filter((message) => !messages.includes(message));
}

export function onEvent(name, handler) {
  api.addEventListener(name, (event) => handler(event.detail));
}

/** Call `handler` with the errors of every node that ComfyUI refuses to queue: {node id: {class_type, errors}}. */
export function onRefused(handler) {
  const queue = api.queuePrompt;
  api.queuePrompt = async function (...args) {
    clearToasts();
    try {
      const answer = await queue.apply(this, args);
      if (answer?.node_errors) handler(answer.node_errors);
      return answer;
    } catch (error) {
      if (error?.response?.node_errors) handler(error.response.node_errors);
      throw error;
    }
  };
}

/** Return what a node is called on the canvas; ids within subgraphs look like "3:7". */
export function titleOf(nodeId, otherwise) {
  let graph = app.graph;
  let node;
  for (const part of String(nodeId).split(":")) {
    node = graph?.getNodeById(Number(part));
    graph = node?.subgraph;
  }
  return node?.title ?? otherwise;
}

/** Return every node of the open workflow, those within subgraphs too. */
export function nodesOf(graph = app.graph) {
  return (graph?._nodes ?? []).flatMap((node) => [node, ...(node.subgraph ? nodesOf(node.subgraph) : [])]);
}

/** Ask for a line of text; null when the person cancels. */
export function ask(title, message, value) {
  return app.extensionManager.dialog.prompt({ title, message, defaultValue: value });
}

/** Hide with a hidden widget the one that ComfyUI puts beside it, such as "control after generate". */
export function hideCompanions(node) {
  for (const widget of node.widgets ?? []) {
    if (!widget.hidden && !widget.options?.hidden) continue;
    for (const companion of widget.linkedWidgets ?? []) companion.hidden = true;
  }
}

/** Return the address of a path of the server, also behind a proxy that serves it below a folder. */
export function urlOf(path) {
  return api.apiURL(path);
}

/** Return the address of a picture as nodes name it: {filename, subfolder, type}. */
export function pictureUrl(picture) {
  return urlOf(`/view?${new URLSearchParams(picture)}`);
}

export function settingOf(id) {
  return app.extensionManager.setting.get(id);
}

export function isDark() {
  return document.querySelector("html.dark-theme, body.dark-theme") !== null;
}

/** Add a tab to the side bar; `render` fills its element when it is opened, `destroy` is called when it is closed. */
export function addSidebarTab(tab) {
  app.extensionManager.registerSidebarTab({ type: "custom", ...tab });
}

/** Return a tab of the bottom panel, whose element `make` gives when it is first opened. */
export function addPanel(id, title, make) {
  let element = null;
  const render = (container) => {
    container.style.cssText += "; height: 100%; overflow: hidden";
    container.replaceChildren((element ??= make()));
  };
  return { id, title, type: "custom", render };
}

/** Call `handler` when the theme has changed. */
export function onTheme(handler) {
  const observer = new MutationObserver(handler);
  for (const element of [document.documentElement, document.body])
    observer.observe(element, { attributes: true, attributeFilter: ["class"] });
}

/** Open a tab of the side bar, or close the open one. */
export function toggleSidebarTab(id) {
  app.extensionManager.command.execute(`Workspace.ToggleSidebarTab.${id}`);
}

/** Add a button that is no value of the workflow; return its widget. */
export function addButton(node, label, onClick) {
  const button = node.addWidget("button", label, null, onClick);
  button.serialize = false;
  button.options.serialize = false;
  return button;
}

/** Put an element into a node, below its widgets; it is no value of the workflow. */
export function addElement(node, name, element, minHeight) {
  const widget = node.addDOMWidget(name, "safety-experts", element, { serialize: false, getMinHeight: () => minHeight });
  widget.serialize = false; // or the saved workflow has an empty value of it
}

/** Leave away the live picture of a node that shows the same in a widget of its own. */
export function hideLivePicture(node) {
  node.hideOutputImages = true; // Nodes 2.0
  Object.defineProperty(node, "imgs", { get: () => undefined, set: () => {} }); // on the canvas
}

/** Call `handler(node, output)` with what nodes of a type show after they ran. */
export function onExecuted(nodeType, handler) {
  const { onExecuted } = nodeType.prototype;
  nodeType.prototype.onExecuted = function (output) {
    onExecuted?.call(this, output);
    handler(this, output ?? {});
  };
}

export function redraw() {
  app.graph.setDirtyCanvas(true, true);
}
