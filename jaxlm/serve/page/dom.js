// Nodes: made, drawn from Markdown, and tokens shaded by probability. Nothing here reads HTML from a text.
import { t } from "./words.js";

const SVG = "http://www.w3.org/2000/svg";
export const $ = (id) => document.getElementById(id);

function fill(node, properties, children, own) {
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (own && name in node) node[name] = value;
    else if (value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}
export const h = (tag, properties = {}, ...children) => fill(document.createElement(tag), properties, children, true);
export const s = (tag, properties = {}, ...children) =>
  fill(document.createElementNS(SVG, tag), properties, children, false);
export const icon = (name) => s("svg", { "aria-hidden": "true" }, s("use", { href: `page/icons.svg#${name}` }));
export const iconButton = (name, key, onclick) =>
  h("button", { class: "icon small", type: "button", title: t(key), "aria-label": t(key), onclick }, icon(name));

// Buttons of which one is pressed: [[value, label], …].
export function segments(node, entries, chosen, choose) {
  const hadFocus = node.contains(document.activeElement);
  const buttons = entries.map(([value, label]) =>
    h("button", { type: "button", "aria-pressed": String(value === chosen), onclick: () => choose(value) }, label));
  node.replaceChildren(...buttons);
  if (hadFocus) buttons[entries.findIndex(([value]) => value === chosen)]?.focus();
  return node;
}

export function download(name, content) {
  const link = h("a", { href: URL.createObjectURL(new Blob([content], { type: "application/json" })), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

// A page that was not read over https (or from this machine) has no clipboard of its own.
export async function copyText(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const area = h("textarea", { value: text, class: "sr" });
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
}

// --- Markdown: headings, paragraphs, lists, code, quotes, tables, rules; emphasis, code and links within them -----------
const INLINE = /(`+)(.+?)\1|\*\*(.+?)\*\*|(?<![\w*])\*([^\s*](?:[^*]*[^\s*])?)\*(?!\w)|\[([^\]]+)\]\((https?:\/\/[^\s)]+)\)/g;

function inline(text) {
  const nodes = [];
  let end = 0;
  for (const match of text.matchAll(INLINE)) {
    nodes.push(text.slice(end, match.index));
    end = match.index + match[0].length;
    if (match[2] !== undefined) nodes.push(h("code", {}, match[2].trim() || match[2]));
    else if (match[3] !== undefined) nodes.push(h("strong", {}, ...inline(match[3])));
    else if (match[4] !== undefined) nodes.push(h("em", {}, ...inline(match[4])));
    else nodes.push(h("a", { href: match[6], target: "_blank", rel: "noopener noreferrer" }, match[5]));
  }
  return [...nodes, text.slice(end)];
}

const ITEM = /^(\s*)(?:[-*+]|(\d+)[.)])\s+(.*)$/;
const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());
const STARTS = /^(#{1,6}\s|```|>\s?|\s*(?:[-*+]|\d+[.)])\s+|(?:---+|\*\*\*+)\s*$)/;

// A text cut into blocks, so that while an answer grows only its last block is drawn again.
function blocks(text) {
  const lines = text.split("\n"), result = [];
  for (let i = 0; i < lines.length; ) {
    const begin = i;
    if (!lines[i].trim()) { i++; continue; }
    if (lines[i].startsWith("```")) {
      for (i++; i < lines.length && !lines[i].startsWith("```"); ) i++;
      i++;
    } else if (lines[i].startsWith(">")) while (i < lines.length && lines[i].startsWith(">")) i++;
    else if (ITEM.test(lines[i])) while (i < lines.length && (ITEM.test(lines[i]) || /^\s{2,}\S/.test(lines[i]))) i++;
    else if (/^(#{1,6}\s|---+\s*$|\*\*\*+\s*$)/.test(lines[i])) i++;
    else for (i++; i < lines.length && lines[i].trim() && !STARTS.test(lines[i]); ) i++;
    result.push(lines.slice(begin, i).join("\n"));
  }
  return result;
}

function list(lines) {
  const root = h(/^\s*\d/.test(lines[0]) ? "ol" : "ul"), open = [[-1, root]];
  for (const line of lines) {
    const match = ITEM.exec(line);
    if (!match) { open.at(-1)[1].lastElementChild?.append(" ", ...inline(line.trim())); continue; }
    const depth = match[1].length;
    while (open.length > 1 && depth < open.at(-1)[0]) open.pop();
    if (open[0][0] < 0) { open[0][0] = depth; if (match[2]) root.start = Number(match[2]); }
    else if (depth > open.at(-1)[0] + 1) {
      const inner = h(match[2] ? "ol" : "ul");
      open.at(-1)[1].lastElementChild.append(inner);
      open.push([depth, inner]);
    }
    open.at(-1)[1].append(h("li", {}, ...inline(match[3])));
  }
  return root;
}

function block(source) {
  const lines = source.split("\n"), heading = /^(#{1,6})\s+(.*)$/.exec(source);
  if (source.startsWith("```")) {
    const code = lines.slice(1, lines.length > 1 && lines.at(-1).startsWith("```") ? -1 : undefined).join("\n");
    const copy = iconButton("copy", "copy", () => copyText(code));
    return h("div", { class: "code" }, h("pre", { tabIndex: 0 }, h("code", {}, code)), copy);
  }
  if (heading) return h(`h${Math.min(6, heading[1].length + 2)}`, {}, ...inline(heading[2]));
  if (/^(---+|\*\*\*+)\s*$/.test(source)) return h("hr");
  if (source.startsWith(">")) return h("blockquote", {}, ...inline(source.replace(/^>\s?/gm, "")));
  if (ITEM.test(source.split("\n")[0])) return list(lines);
  if (lines.length > 1 && source.startsWith("|") && /^[\s|:-]+$/.test(lines[1])) {
    return table(cells(lines[0]), lines.slice(2).map(cells), inline);
  }
  return h("p", {}, ...inline(source));
}

export function table(head, rows, draw = (text) => [text]) {
  const row = (texts, tag) => h("tr", {}, ...texts.map((text) => h(tag, {}, ...draw(text))));
  return h("div", { class: "table", tabIndex: 0, role: "region", "aria-label": head.join(", ") },
    h("table", {}, h("thead", {}, row(head, "th")), h("tbody", {}, ...rows.map((texts) => row(texts, "td")))));
}

export function drawMarkdown(node, text) {
  const next = blocks(text), known = node.blocks ?? [];
  let same = 0;
  while (same < next.length && same < known.length && next[same] === known[same]) same++;
  while (node.childNodes.length > same) node.lastChild.remove();
  node.append(...next.slice(same).map(block));
  node.blocks = next;
}

// --- tokens -------------------------------------------------------------------------------------------------------------
const visible = (token) => token.replace(/ /g, "␣").replace(/\n/g, "⏎").replace(/\t/g, "⇥") || "∅";
const percent = (logprob) => `${(100 * Math.exp(logprob)).toFixed(logprob > -4.6 ? 1 : 2)} %`;

function showTip(target, [token, logprob, top]) {
  const tip = $("tip"), place = target.getBoundingClientRect();
  tip.replaceChildren(h("b", {}, visible(token)), ` ${percent(logprob)}`, ...top.map(([other, value]) => {
    const bar = h("i");
    bar.style.setProperty("--p", Math.exp(value));
    return h("div", { class: other === token ? "chosen" : "" }, bar, h("code", {}, visible(other)), h("span", {}, percent(value)));
  }));
  tip.hidden = false;
  const left = Math.min(place.left, innerWidth - tip.offsetWidth - 8);
  const top_ = place.bottom + 6 + tip.offsetHeight < innerHeight ? place.bottom + 6 : place.top - tip.offsetHeight - 6;
  tip.style.left = `${Math.max(8, left)}px`;
  tip.style.top = `${Math.max(8, top_)}px`;
}

// One token is in the order of Tab; arrows, Home and End go from token to token.
export function drawTokens(node, tokens) {
  const hide = () => { $("tip").hidden = true; };
  const spans = tokens.map((entry, at) => {
    const span = h("span", { role: "option", tabIndex: at ? -1 : 0, "aria-selected": "false" }, entry[0] === "" ? "∅" : entry[0]);
    span.setAttribute("aria-label", `${visible(entry[0])} ${percent(entry[1])}`);
    span.style.setProperty("--p", Math.exp(entry[1]));
    const show = () => showTip(span, entry);
    for (const kind of ["mouseenter", "focus"]) span.addEventListener(kind, show);
    for (const kind of ["mouseleave", "blur"]) span.addEventListener(kind, hide);
    return span;
  });
  const move = (event) => {
    const at = spans.indexOf(document.activeElement);
    const to = { ArrowRight: at + 1, ArrowDown: at + 1, ArrowLeft: at - 1, ArrowUp: at - 1, Home: 0, End: spans.length - 1 }[event.key];
    if (event.key === "Escape") hide();
    if (to === undefined || !spans[to]) return;
    event.preventDefault();
    spans[at].tabIndex = -1;
    spans[to].tabIndex = 0;
    spans[to].focus();
  };
  const box = h("div", { class: "tokens", onkeydown: move }, ...spans);
  box.setAttribute("role", "listbox");
  box.setAttribute("aria-label", t("tokens_label"));
  node.replaceChildren(box, h("p", { class: "note" }, t("tokens_note")));
}

// --- molecules: only shapes are taken from the server's drawing ----------------------------------------------------------
const SHAPES = new Set(["path", "rect", "ellipse", "circle", "polygon", "line", "g"]);
const PARTS = new Set(["d", "x", "y", "x1", "y1", "x2", "y2", "cx", "cy", "r", "rx", "ry", "width", "height", "points",
  "fill", "stroke", "stroke-width", "stroke-linecap", "stroke-linejoin", "stroke-opacity", "fill-rule", "fill-opacity"]);

export function drawing(source, label) {
  const copy = (node) => s(node.localName,
    Object.fromEntries([...node.attributes].filter(({ name }) => PARTS.has(name)).map(({ name, value }) => [name, value])),
    ...[...node.children].filter((child) => SHAPES.has(child.localName)).map(copy));
  const root = new DOMParser().parseFromString(source, "image/svg+xml").documentElement;
  const svg = copy(root);
  for (const [name, value] of [["viewBox", root.getAttribute("viewBox")], ["class", "mol"], ["role", "img"], ["aria-label", label]]) {
    svg.setAttribute(name, value);
  }
  return svg;
}
