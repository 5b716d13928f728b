// Extraction: the prompt (IEPile's and OneKE's shape), the answer's rows, its entities in the text, and its graph.
import { h, s } from "./dom.js";
import { inLanguage, t } from "./words.js";

export const KINDS = ["NER", "RE", "EE"];

// "eruption: volcano, date" → a type and its roles; other kinds have no roles.
export function schemaEntry(text) {
  const [name, roles = ""] = text.split(/[:：](.*)/s);
  return { name: name.trim(), roles: roles.split(/[,，、]/).map((role) => role.trim()).filter(Boolean) };
}

export function extractPrompt({ kind, schema, text, language }) {
  const entries = schema.map(schemaEntry);
  const types = entries.map(({ name, roles }) => (kind === "EE" ? { event_type: name, trigger: true, arguments: roles } : name));
  return JSON.stringify({ instruction: inLanguage(`x_${kind}`, language), schema: types, input: text });
}

// JSON Schema of the answer, for servers that hold the answer to it.
export function answerSchema({ kind, schema }) {
  const string = { type: "string" };
  const object = (properties) => ({ type: "object", properties, required: Object.keys(properties), additionalProperties: false });
  const each = (names, item) => object(Object.fromEntries(names.map((name) => [name, item(name)])));
  const entries = schema.map(schemaEntry), roles = Object.fromEntries(entries.map((entry) => [entry.name, entry.roles]));
  const items = {
    NER: () => string,
    RE: () => object({ subject: string, object: string }),
    EE: (name) => object({ trigger: string, arguments: each(roles[name], () => ({ type: "array", items: string })) }),
  }[kind];
  return each(entries.map(({ name }) => name), (name) => ({ type: "array", items: items(name) }));
}

export const COLUMNS = { NER: ["entity", "type"], RE: ["head", "relation", "tail"], EE: ["event", "trigger", "role", "argument"] };
const list = (value) => (Array.isArray(value) ? value : value === undefined || value === null || value === "" ? [] : [value]);

function rowsOf(kind, name, item) {
  if (kind === "NER") return [[typeof item === "string" ? item : (item.entity ?? item.name), name]];
  if (kind === "RE") return [[item.subject ?? item.head, name, item.object ?? item.tail]];
  const roles = Object.entries(item.arguments ?? {}).flatMap(([role, texts]) => list(texts).map((text) => [role, text]));
  return (roles.length ? roles : [["", ""]]).map(([role, text]) => [name, item.trigger ?? "", role, text]);
}

// Rows of an answer; null: it has neither of the shapes, JSON or (head, relation, tail) texts.
export function rows(kind, text) {
  try {
    const content = JSON.parse(text.slice(text.indexOf("{"), text.lastIndexOf("}") + 1));
    return Object.entries(content).flatMap(([name, items]) => list(items).flatMap((item) => rowsOf(kind, name, item)))
      .filter((row) => row.every((cell) => typeof cell === "string"));
  } catch (error) {
    if (!(error instanceof SyntaxError || error instanceof TypeError)) throw error;
  }
  const size = COLUMNS[kind].length;
  const tuples = [...text.matchAll(/[(（]([^()（）]*)[)）]/g)].map((match) => match[1].split(/[,，]/).map((cell) => cell.trim()));
  const whole = kind === "EE" ? [] : tuples.filter((cells) => cells.length === size && cells.every(Boolean));
  return whole.length ? whole : null;
}

// The text with what was found in it marked.
export function marked(kind, text, found) {
  const names = { NER: (row) => [[row[0], row[1]]], RE: (row) => [[row[0], ""], [row[2], ""]], EE: (row) => [[row[1], row[0]], [row[3], row[2]]] };
  const labels = new Map(found.flatMap(names[kind]).filter(([part]) => part));
  const parts = [...labels.keys()].sort((a, b) => b.length - a.length).map((part) => part.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"));
  if (!parts.length) return h("p", { class: "source" }, text);
  return h("p", { class: "source" }, ...text.split(new RegExp(`(${parts.join("|")})`)).map((part) =>
    labels.has(part) ? h("mark", {}, part, labels.get(part) ? h("small", {}, labels.get(part)) : null) : part));
}

// --- the graph ----------------------------------------------------------------------------------------------------------
const edgesOf = {
  NER: (row) => [row[1], "", row[0]],
  RE: (row) => row,
  EE: (row) => (row[3] ? [row[1] || row[0], row[2], row[3]] : [row[0], "", row[1]]),
};
const isHub = { NER: (row) => row[1], RE: () => null, EE: (row) => row[1] || row[0] };
const CJK = /[⺀-鿿가-힯＀-￯]/;
const width = (text) => [...text].reduce((sum, letter) => sum + (CJK.test(letter) ? 13 : 7.2), 0);
const short = (text) => (text.length > 28 ? `${text.slice(0, 27)}…` : text);

// Nodes that edges join, directly or by way of others.
function groups(nodes, edges) {
  const result = new Map(nodes.map((node) => [node, [node]]));
  for (const { from, to } of edges) {
    const [a, b] = [result.get(from), result.get(to)];
    if (a !== b) for (const node of b) { a.push(node); result.set(node, a); }
  }
  return [...new Set(result.values())];
}

// Springs along edges, all nodes apart from one another, then boxes that overlap moved apart; the same every time.
function settle(nodes, edges) {
  nodes.forEach((node, at) => {
    const angle = (2 * Math.PI * at) / nodes.length;
    Object.assign(node, { x: 180 * Math.cos(angle), y: 110 * Math.sin(angle + 0.3) });
  });
  for (let step = 0; step < 320; step++) {
    for (const node of nodes) Object.assign(node, { dx: -node.x * 0.02, dy: -node.y * 0.05 });
    for (const a of nodes) for (const b of nodes) {
      if (a === b) continue;
      const dx = a.x - b.x || 0.1, dy = a.y - b.y || 0.1, push = 9000 / Math.hypot(dx, dy) ** 3;
      a.dx += 3 * push * dx;
      a.dy += 2 * push * dy;
    }
    for (const { from, to, label } of edges) {
      const dx = to.x - from.x, dy = to.y - from.y, far = Math.hypot(dx, dy) || 1;
      const pull = ((far - (70 + (from.w + to.w) / 2 + width(label))) * 0.03) / far;
      from.dx += dx * pull; from.dy += dy * pull; to.dx -= dx * pull; to.dy -= dy * pull;
    }
    for (const node of nodes) {
      const far = Math.hypot(node.dx, node.dy) || 1, part = Math.min(far, 14 * (1 - step / 320)) / far;
      node.x += node.dx * part; node.y += node.dy * part;
    }
  }
  for (let round = 0; round < 60; round++) for (const a of nodes) for (const b of nodes) {
    const under = 44 - Math.abs(a.y - b.y);
    if (a === b || (a.w + b.w) / 2 + 14 <= Math.abs(a.x - b.x) || under <= 0) continue;
    const side = a.y < b.y || (a.y === b.y && nodes.indexOf(a) < nodes.indexOf(b)) ? -1 : 1;
    a.y += (side * under) / 2; b.y -= (side * under) / 2;
  }
}

const bounds = (nodes) => ({
  left: Math.min(...nodes.map(({ x, w }) => x - w / 2)) - 16, right: Math.max(...nodes.map(({ x, w }) => x + w / 2)) + 16,
  top: Math.min(...nodes.map(({ y }) => y)) - 28, bottom: Math.max(...nodes.map(({ y }) => y)) + 28,
});

// Groups stand in lines, each no wider than the page.
function place(nodes, edges) {
  let left = 0, top = 0, high = 0;
  for (const group of groups(nodes, edges)) {
    settle(group, edges.filter(({ from }) => group.includes(from)));
    const box = bounds(group);
    if (left && left + box.right - box.left > 760) { left = 0; top += high; high = 0; }
    for (const node of group) { node.x += left - box.left; node.y += top - box.top; }
    left += box.right - box.left;
    high = Math.max(high, box.bottom - box.top);
  }
}

export function graph(kind, found) {
  const byName = new Map(), hubs = new Set(found.map(isHub[kind]));
  const node = (name) => byName.get(name) ?? byName.set(name, { name, label: short(name), w: width(short(name)) + 22 }).get(name);
  const edges = found.map(edgesOf[kind]).filter(([from, , to]) => from && to && from !== to)
    .map(([from, label, to]) => ({ from: node(from), label: short(label), to: node(to) }));
  const nodes = [...byName.values()];
  if (!nodes.length) return h("p", { class: "note" }, t("nothing"));
  place(nodes, edges);
  const box = bounds(nodes);
  const counts = new Map();
  const lines = edges.map(({ from, label, to }) => {
    const key = [from.name, to.name].sort().join("\n"), order = counts.get(key) ?? 0;
    counts.set(key, order + 1);
    const bend = (order % 2 ? 1 : -1) * Math.ceil(order / 2) * 46 * (from.name < to.name ? 1 : -1);
    const dx = to.x - from.x, dy = to.y - from.y, far = Math.hypot(dx, dy) || 1;
    const mid = { x: (from.x + to.x) / 2 - (dy / far) * bend, y: (from.y + to.y) / 2 + (dx / far) * bend };
    const edge = (end) => { // where the line from the middle meets the label's box
      const ex = mid.x - end.x, ey = mid.y - end.y, cut = Math.min((end.w / 2 + 3) / (Math.abs(ex) || 1e-6), 18 / (Math.abs(ey) || 1e-6), 1);
      return `${(end.x + ex * cut).toFixed(1)} ${(end.y + ey * cut).toFixed(1)}`;
    };
    const path = bend ? `M${edge(from)}Q${mid.x.toFixed(1)} ${mid.y.toFixed(1)} ${edge(to)}` : `M${edge(from)}L${edge(to)}`;
    const half = bend ? 0.5 : 0;
    const at = { x: mid.x * (1 - half) + half * (from.x + to.x) / 2, y: mid.y * (1 - half) + half * (from.y + to.y) / 2 };
    return [s("path", { d: path, "marker-end": "url(#arrow)" }), s("text", { x: at.x, y: at.y + 4, class: "edge" }, label)];
  });
  const boxes = nodes.map(({ name, label, x, y, w }) => s("g", { class: hubs.has(name) ? "hub" : "" }, s("title", {}, name),
    s("rect", { x: x - w / 2, y: y - 15, width: w, height: 30, rx: 15 }), s("text", { x, y: y + 4.5 }, label)));
  const arrow = s("marker", { id: "arrow", viewBox: "0 0 8 8", refX: 7, refY: 4, markerWidth: 7, markerHeight: 7, orient: "auto" },
    s("path", { d: "M0 0L8 4L0 8z" }));
  const [wide, high] = [box.right - box.left, box.bottom - box.top];
  const label = edges.map(({ from, label: name, to }) => `${from.name} ${name || "–"} ${to.name}`).join("; ");
  return h("div", { class: "graph" }, s("svg", { viewBox: `${box.left} ${box.top} ${wide} ${high}`, width: wide, height: high, role: "img", "aria-label": label },
    s("defs", {}, arrow), ...lines.map(([path]) => path), ...boxes, ...lines.map(([, text]) => text)));
}
