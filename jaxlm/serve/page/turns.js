// One turn of a conversation: what was asked, and an answer beside which another model's may stand.
import { copyText, download, drawMarkdown, drawTokens, h, iconButton, segments, table } from "./dom.js";
import { COLUMNS, graph, marked, rows } from "./extract.js";
import { t } from "./words.js";

const TAGGED = /<smiles>(.*?)<\/smiles>/gs;
const compact = (text) => text.replace(/\s+/g, "");

function askView(ask, molecule) {
  const parts = [h("div", { class: "said" }, ask.text)];
  if (ask.mode === "instruction" && ask.input) parts.push(h("div", { class: "label" }, t("input")), h("div", { class: "said" }, ask.input));
  if (ask.mode === "extract") parts.unshift(h("div", { class: "label" }, `${t(ask.kind)}: ${ask.schema.join(" · ")}`));
  if (ask.mode === "molecule") {
    parts.unshift(h("div", { class: "label" }, t(ask.direction)));
    if (ask.direction === "describe") molecule(ask.text).then((node) => parts[1].after(node));
  }
  return parts;
}

function resultView(ask, answer) {
  const found = rows(ask.kind, answer.text), columns = COLUMNS[ask.kind];
  if (found === null) return [h("p", { class: "note" }, t("unreadable")), h("pre", { class: "plain", tabIndex: 0 }, answer.text)];
  const content = { model: answer.model, kind: ask.kind, schema: ask.schema, input: ask.text,
    rows: found.map((row) => Object.fromEntries(columns.map((name, at) => [name, row[at]]))) };
  const save = h("button", { class: "quiet", onclick: () => download("extraction.json", JSON.stringify(content, null, 1)) }, t("download"));
  if (!found.length) return [h("p", { class: "note" }, t("nothing"))];
  return [marked(ask.kind, ask.text, found), table(columns.map((name) => t(name)), found), graph(ask.kind, found), save];
}

async function drawMolecules(node, ask, text, molecule) {
  const tagged = [...text.matchAll(TAGGED)].map((match) => compact(match[1]));
  const found = tagged.length || ask.mode !== "molecule" || ask.direction !== "design" ? tagged : [compact(text)];
  const drawn = await Promise.all([...new Set(found)].filter(Boolean).slice(0, 6).map(molecule));
  node.replaceChildren(...drawn);
}

function answerView(turn, answer, isLast, actions, views) {
  const body = h("div", { class: "body" }), foot = h("div", { class: "foot" }), molecules = h("div", { class: "molecules" });
  const node = h("article", { class: "answer" }, h("div", { class: "who" }, answer.model), body, molecules, foot);
  let view = turn.ask.mode === "extract" ? "result" : "text", drawn = null;

  function drawBody() {
    const now = answer.busy && view === "result" ? "text" : view;
    if (now !== drawn) { body.replaceChildren(); delete body.blocks; }
    if (now === "tokens") { if (answer.busy || now !== drawn) drawTokens(body, answer.tokens); }
    else if (now === "result") { if (now !== drawn && answer.text) body.replaceChildren(...resultView(turn.ask, answer)); }
    else if (turn.ask.mode === "extract") body.replaceChildren(h("pre", { class: "plain", tabIndex: 0 }, answer.text));
    else drawMarkdown(body, answer.text);
    drawn = now;
  }
  function drawFoot() {
    const all = [["result", t("result")], ["text", t("answer")], ["tokens", t("tokens")]];
    const possible = all.filter(([name]) => name === "text" || (name === "result" && turn.ask.mode === "extract") || (name === "tokens" && answer.tokens.length));
    const chooser = possible.length > 1 && answer.text ? segments(h("div", { class: "segments small" }), possible, view, (name) => { view = name; draw(); }) : null;
    const { usage, seconds, finish, error } = answer, count = usage?.completion_tokens ?? answer.tokens.length;
    const facts = [count ? t("count", { count }) : "", seconds && answer.text ? `${seconds.toFixed(1)} s` : "", count && seconds ? t("rate", { rate: (count / seconds).toFixed(count / seconds < 10 ? 1 : 0) }) : "",
      finish === "length" ? t("cut") : finish === "stopped" ? t("stopped") : ""].filter(Boolean).join(" · ");
    const buttons = [
      answer.text ? iconButton("copy", "copy", () => copyText(answer.text).then(() => actions.toast(t("copied")))) : null,
      isLast && !actions.busy() && !error ? iconButton("again", "regenerate", () => actions.regenerate([answer])) : null,
    ];
    foot.replaceChildren(...[chooser, ...buttons, h("span", { class: "facts", title: answer.seed === undefined ? "" : `${t("seed")} ${answer.seed}` }, facts)].filter(Boolean));
    foot.hidden = answer.busy;
  }
  function draw() {
    node.classList.toggle("busy", Boolean(answer.busy));
    node.setAttribute("aria-busy", String(Boolean(answer.busy)));
    drawBody();
    drawFoot();
    node.querySelector(".error")?.remove();
    if (answer.error) {
      foot.before(h("div", { class: "error", role: "alert" }, h("span", {}, t(answer.error.word, answer.error.values)),
        isLast && !actions.busy() ? h("button", { class: "quiet", onclick: () => actions.regenerate([answer]) }, t("again")) : ""));
    }
    if (!answer.busy && answer.text && molecules.dataset.text !== answer.text) {
      molecules.dataset.text = answer.text;
      drawMolecules(molecules, turn.ask, answer.text, actions.molecule);
    } else if (answer.busy) { molecules.replaceChildren(); molecules.dataset.text = ""; drawn = drawn === "result" ? null : drawn; }
  }
  views.set(answer, draw);
  draw();
  return node;
}

export function turnView(turn, at, isLast, actions, views) {
  const question = h("div", { class: "ask" }, h("div", { class: "bubble" }, ...askView(turn.ask, actions.molecule)),
    iconButton("edit", "edit", () => actions.edit(at)));
  return h("section", { class: "turn" }, question,
    h("div", { class: "lanes" }, ...turn.answers.map((answer) => answerView(turn, answer, isLast, actions, views))));
}
