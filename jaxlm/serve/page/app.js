// The page: what is asked, how it is answered, what is kept. Drawing is in turns.js, dom.js and extract.js.
import { call, health, read, Refused, setKey, stream } from "./api.js";
import { $, download, drawing, h, icon, iconButton, segments } from "./dom.js";
import { answerSchema, extractPrompt, KINDS } from "./extract.js";
import { choices, conversations, exported, forget, imported, keep, keepChoices, newConversation } from "./store.js";
import { turnView } from "./turns.js";
import { language, LANGUAGES, setLanguage, t, translate } from "./words.js";

const state = { talk: newConversation(), models: [], settings: null, running: null, editing: null, follow: true, health: undefined };
const isBusy = () => state.running !== null;
const own = (model = choices.model) => state.settings?.models[model] ?? { template: "", takes_turns: true };
const MODES = () => [...(own().takes_turns ? ["chat"] : []), "instruction", "extract", ...(state.settings?.modalities.includes("smiles") ? ["molecule"] : [])];
const FIELDS = { chat: "chat-text", instruction: "instruction-text", extract: "extract-text", molecule: "molecule-text" };

// --- what is asked ------------------------------------------------------------------------------------------------------
function readAsk() {
  const { mode } = choices, text = $(FIELDS[mode]).value.trim(), template = choices.template;
  if (mode === "extract") addToSchema();
  return {
    chat: { mode, text },
    instruction: { mode, text, input: $("instruction-input").value.trim(), template },
    extract: { mode, text, template, kind: choices.kind, schema: schema(), force: choices.force, language },
    molecule: { mode, text, direction: choices.direction },
  }[mode];
}

function fillComposer(ask) {
  for (const name of ["template", "kind", "direction", "force"]) if (ask[name] !== undefined) choices[name] = ask[name];
  if (ask.schema) choices.schemas[ask.kind] = [...ask.schema];
  setMode(ask.mode);
  $(FIELDS[ask.mode]).value = ask.text;
  if (ask.mode === "instruction") $("instruction-input").value = ask.input;
  if (ask.mode === "molecule") preview();
  $(FIELDS[ask.mode]).focus();
}

function sampling() {
  const values = Object.fromEntries(state.settings.sampling.map(({ name, value }) => [name, choices.sampling[name] ?? value]));
  const stop = choices.stops.split("\n").filter(Boolean).slice(0, 4).map((text) => text.replace(/\\n/g, "\n"));
  return { ...values, ...(stop.length && { stop }) };
}

// The text that a chosen template makes of a question; null: the server writes the prompt, in the model's own template.
function promptOf(ask, model) {
  if (ask.mode === "molecule") return state.settings.molecule[ask.direction].replace("{text}", () => ask.text);
  if (!ask.template && own(model).template !== "text") return null;
  const values = { instruction: ask.mode === "extract" ? extractPrompt(ask) : ask.text, input: ask.input };
  const frame = state.settings.prompts[ask.template]?.[ask.input ? "with_input" : "without_input"];
  return (frame ?? (ask.input ? "{instruction}\n{input}" : "{instruction}")).replace(/\{(instruction|input)\}/g, (_, field) => values[field]);
}

function request(turn, answer) {
  const { ask } = turn, prompt = promptOf(ask, answer.model), lane = turn.answers.indexOf(answer);
  answer.seed = choices.seed === "" ? Math.floor(Math.random() * 2 ** 31) : Number(choices.seed);
  const body = { model: answer.model, ...sampling(), seed: answer.seed };
  if (prompt !== null) return ["v1/completions", { ...body, prompt, ...(choices.logprobs && { logprobs: 5 }) }];
  if (ask.mode === "extract" && ask.force) {
    body.response_format = { type: "json_schema", json_schema: { name: "extraction", schema: answerSchema(ask), strict: true } };
  }
  const messages = choices.system.trim() ? [{ role: "system", content: choices.system.trim() }] : [];
  if (ask.mode === "chat") {
    for (const earlier of state.talk.turns.slice(0, state.talk.turns.indexOf(turn))) {
      const given = earlier.answers[lane] ?? earlier.answers[0];
      if (earlier.ask.mode !== "chat" || !given.text) continue;
      messages.push({ role: "user", content: earlier.ask.text }, { role: "assistant", content: given.text });
    }
  }
  messages.push({ role: "user", content: ask.mode === "extract" ? extractPrompt(ask) : ask.text, ...(ask.input && { input: ask.input }) });
  return ["v1/chat/completions", { ...body, messages, ...(choices.logprobs && { logprobs: true, top_logprobs: 5 }) }];
}

// --- how it is answered -------------------------------------------------------------------------------------------------
function save(talk) {
  if (talk.isForgotten) return;
  talk.changed = Date.now();
  sessionStorage.setItem("jaxlm.open", state.talk.id);
  if (!keep(talk)) toast(t("full"));
}

async function answerOne(talk, turn, answer, signal) {
  Object.assign(answer, { text: "", tokens: [], error: null, finish: null, usage: null, busy: true });
  const began = performance.now();
  let saved = began;
  try {
    const [path, body] = request(turn, answer);
    for await (const { text, tokens, finish, usage } of stream(path, body, signal)) {
      answer.text += text;
      for (const token of tokens) answer.tokens.push(token);
      answer.finish = finish ?? answer.finish;
      answer.usage = usage ?? answer.usage;
      redraw(answer);
      if (performance.now() - saved > 2000) { saved = performance.now(); save(talk); }
    }
  } catch (error) {
    if (error.name === "AbortError") answer.finish = "stopped";
    else if (error instanceof Refused) {
      answer.error = { word: error.word, values: error.values };
      if (error.word === "e_key") showKeyForm();
      if (error.word === "e_away" || error.word === "e_ready") watch();
    } else throw error;
  } finally {
    Object.assign(answer, { busy: false, seconds: Math.round(performance.now() - began) / 1000 });
    redraw(answer);
  }
}

async function answerTurn(turn, answers = turn.answers) {
  const { talk } = state, running = new AbortController();
  state.running = running;
  showRunning();
  save(talk);
  drawList();
  try {
    await Promise.all(answers.map((answer) => answerOne(talk, turn, answer, running.signal)));
  } finally {
    if (state.running === running) state.running = null;
    showRunning();
    save(talk);
    drawList();
    $("said").textContent = t(answers.some(({ error }) => error) ? "said_error" : "said_done");
  }
}

function send() {
  const ask = readAsk();
  if (isBusy() || !state.settings || !ask.text) return;
  if (ask.schema && !ask.schema.length) { $("schema-add").focus(); toast(t("schema_empty")); return; }
  const models = [choices.model, ...(choices.second ? [choices.second] : [])];
  const turn = { ask, answers: models.map((model) => ({ model, text: "", tokens: [] })) };
  if (state.editing !== null) {
    const { talk } = state, before = talk.turns;
    talk.turns = before.slice(0, state.editing);
    stopEditing();
    if (before.length > talk.turns.length + 1) {
      toast(t("replaced"), () => { state.running?.abort(); talk.turns = before; keep(talk); if (state.talk === talk) drawTalk(); });
    }
  }
  state.talk.turns.push(turn);
  if (ask.mode === "chat") $("chat-text").value = "";
  state.follow = true;
  fold(ask.mode !== "chat" && innerHeight < 900 && innerWidth < 781);
  drawTalk();
  answerTurn(turn);
}

function regenerate(answers) {
  const turn = state.talk.turns.at(-1);
  if (!isBusy() && turn && state.settings) answerTurn(turn, answers);
}

function edit(at) {
  if (isBusy()) return;
  state.editing = at;
  $("editing").hidden = false;
  fillComposer(state.talk.turns[at].ask);
}
function stopEditing() {
  state.editing = null;
  $("editing").hidden = true;
}

// --- drawing ------------------------------------------------------------------------------------------------------------
const views = new Map(), waiting = new Set();
function redraw(answer) {
  if (!waiting.size) requestAnimationFrame(() => {
    for (const one of waiting) views.get(one)?.();
    waiting.clear();
  });
  waiting.add(answer);
}

function drawTalk() {
  views.clear();
  const { turns } = state.talk, actions = { edit, regenerate, toast, molecule, busy: isBusy };
  const nodes = turns.map((turn, at) => turnView(turn, at, at === turns.length - 1, actions, views));
  $("log").replaceChildren(...(nodes.length ? nodes : [emptyView()]));
  document.body.classList.toggle("two", turns.some(({ answers }) => answers.length > 1));
}
const toEnd = () => { $("scroll").scrollTop = $("scroll").scrollHeight; };
new ResizeObserver(() => { if (state.follow) toEnd(); }).observe($("log"));

function emptyView() {
  const examples = {
    chat: ["ex_chat_1", "ex_chat_2", "ex_chat_3"].map((word) => ({ mode: "chat", text: t(word) })),
    instruction: [{ mode: "instruction", text: t("ex_instruction"), input: t("ex_input"), template: choices.template }],
    extract: [{ mode: "extract", text: t("ex_extract"), kind: "RE", schema: t("ex_schema").split("|") }],
    molecule: [{ mode: "molecule", text: "CC(=O)Oc1ccccc1C(=O)O", direction: "describe" }, { mode: "molecule", text: t("ex_molecule"), direction: "design" }],
  }[choices.mode];
  return h("div", { class: "empty" }, h("h2", {}, t(`hello_${choices.mode}`)), h("p", {}, t(`about_${choices.mode}`)),
    h("div", { class: "examples" }, ...examples.map((ask) => h("button", { onclick: () => fillComposer(ask) }, ask.text))));
}

const titleOf = (talk) => talk.turns[0]?.ask.text.replace(/\s+/g, " ").slice(0, 80) || t("new");
function drawList() {
  $("conversations").replaceChildren(...conversations().map((talk) => h("li", { class: talk.id === state.talk.id ? "open" : "" },
    h("button", { class: "talk", "aria-current": String(talk.id === state.talk.id), onclick: () => openTalk(talk) }, titleOf(talk)),
    iconButton("trash", "delete", () => {
      forget(talk.id);
      if (talk.id === state.talk.id) { state.talk.isForgotten = true; openTalk(newConversation()); }
      drawList();
      toast(t("deleted"), () => { keep(talk); drawList(); });
    }))));
}

function openTalk(talk) {
  state.running?.abort();
  state.running = null;
  for (const answer of talk.turns.flatMap(({ answers }) => answers)) if (answer.busy) Object.assign(answer, { busy: false, finish: "stopped" });
  Object.assign(state, { talk, follow: true });
  stopEditing();
  sessionStorage.setItem("jaxlm.open", talk.id);
  drawTalk();
  drawList();
  panel("list", false);
}

let toastTimer;
function toast(text, undo) {
  clearTimeout(toastTimer);
  const hide = () => { $("toast").hidden = true; };
  $("toast").replaceChildren(text, undo ? h("button", { class: "link", onclick: () => { hide(); undo(); } }, t("undo")) : "");
  $("toast").hidden = false;
  toastTimer = setTimeout(hide, 7000);
}

function showRunning() {
  $("send").hidden = isBusy();
  $("stop").hidden = !isBusy();
  document.body.classList.toggle("busy", isBusy());
  for (const view of views.values()) view();
}

// A panel beside the answers; where there is no room beside them it lies above, over a shade.
function panel(name, isOpen) {
  if (name === "settings") {
    $("settings").hidden = !isOpen;
    $("open-settings").setAttribute("aria-expanded", String(isOpen));
  }
  document.body.classList.toggle(`with-${name}`, isOpen);
  $("shade").hidden = !document.body.classList.contains("with-list") && $("settings").hidden;
}

// Without the composer the answers have its place; on a phone they need it.
function fold(isFolded) {
  document.body.classList.toggle("folded", isFolded);
  $("fold").setAttribute("aria-expanded", String(!isFolded));
}

// --- the composer -------------------------------------------------------------------------------------------------------
function setMode(mode) {
  choices.mode = MODES().includes(mode) ? mode : MODES()[0];
  keepChoices();
  fold(false);
  drawComposer();
  if (!state.talk.turns.length) drawTalk();
}

function drawComposer() {
  segments($("modes"), MODES().map((mode) => [mode, t(mode)]), choices.mode, setMode);
  for (const section of document.querySelectorAll("[data-mode]")) section.hidden = section.dataset.mode !== choices.mode;
  segments($("kinds"), KINDS.map((kind) => [kind, t(kind)]), choices.kind, (kind) => { choices.kind = kind; keepChoices(); drawComposer(); });
  segments($("directions"), ["describe", "design"].map((way) => [way, t(way)]), choices.direction, (way) => {
    choices.direction = way;
    keepChoices();
    drawComposer();
    preview();
  });
  $("molecule-text").placeholder = t(`${choices.direction}_hint`);
  $("template-label").hidden = !["instruction", "extract"].includes(choices.mode);
  $("force-label").hidden = choices.mode !== "extract" || choices.template !== "" || own().template === "text";
  $("force").checked = choices.force;
  $("template").value = choices.template;
  $("schema-add").placeholder = t(choices.kind === "EE" ? "schema_hint_roles" : "schema_hint");
  const presets = (state.settings?.schemas ?? []).filter(({ kind }) => kind === choices.kind);
  $("preset").replaceChildren(h("option", { value: "" }, t("preset")), ...presets.map((preset) => h("option", { value: preset.name.en }, preset.name[language])));
  for (const chip of document.querySelectorAll("#schema .chip")) chip.remove();
  $("schema-add").before(...schema().map((entry, at) => h("span", { class: "chip" },
    h("button", { type: "button", title: t("edit"), onclick: () => { $("schema-add").value = entry; removeFromSchema(at); } }, entry),
    h("button", { type: "button", "aria-label": `${t("delete")}: ${entry}`, onclick: () => removeFromSchema(at) }, icon("close")))));
}

const schema = () => choices.schemas[choices.kind] ?? state.settings?.schemas.find(({ kind }) => kind === choices.kind)?.schema[language] ?? [];
function setSchema(entries) {
  choices.schemas[choices.kind] = entries;
  keepChoices();
  drawComposer();
}
function addToSchema() {
  const text = $("schema-add").value, parts = (choices.kind === "EE" ? [text] : text.split(/[,，、]/)).map((part) => part.trim()).filter(Boolean);
  $("schema-add").value = "";
  if (parts.length) setSchema([...new Set([...schema(), ...parts])]);
}
function removeFromSchema(at) {
  setSchema(schema().filter((_, other) => other !== at));
  $("schema-add").focus();
}

// A drawing by the server, or words that say why there is none.
async function molecule(smiles) {
  try {
    return drawing(await (await call("page/molecule", { smiles })).text(), smiles);
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    return h("p", { class: "note" }, t(error.word, error.values));
  }
}
let previewTimer;
function preview() {
  clearTimeout(previewTimer);
  const smiles = $("molecule-text").value.trim();
  $("preview").hidden = choices.direction !== "describe" || !smiles;
  if (!$("preview").hidden) previewTimer = setTimeout(async () => {
    const node = await molecule(smiles);
    if ($("molecule-text").value.trim() === smiles) $("preview").replaceChildren(node);
  }, 250);
}

// --- settings and server ------------------------------------------------------------------------------------------------
function drawSettings() {
  const sliders = (state.settings?.sampling ?? []).map(({ name, value, min, max, step }) => {
    const chosen = choices.sampling[name] ?? value, field = { min, max, step, value: chosen };
    const number = h("input", { type: "number", "aria-label": t(`s_${name}`), ...field }), range = h("input", { type: "range", "aria-label": t(`s_${name}`), ...field });
    const node = h("div", { class: "slider", title: t(`h_${name}`) }, h("span", {}, t(`s_${name}`)), number, range);
    const mark = () => node.classList.toggle("changed", choices.sampling[name] !== undefined);
    const change = ({ target }) => {
      const given = Number(target.value);
      if (target.value === "" || !(given >= min)) { target.value = choices.sampling[name] ?? value; return; }
      number.value = range.value = given;
      if (given === value) delete choices.sampling[name]; else choices.sampling[name] = given;
      mark();
      keepChoices();
    };
    range.addEventListener("input", change);
    number.addEventListener("change", change);
    mark();
    return node;
  });
  $("sliders").replaceChildren(...sliders);
  $("seed").value = choices.seed;
  $("stops").value = choices.stops;
  $("system").value = choices.system;
  $("logprobs").checked = choices.logprobs;
}

function drawChoosers() {
  const options = state.models.map((id) => h("option", { value: id }, id));
  if (state.settings && !state.models.includes(choices.model)) choices.model = state.models[0];
  if (state.settings && !state.models.includes(choices.second)) choices.second = "";
  $("model").replaceChildren(...options);
  $("second").replaceChildren(h("option", { value: "" }, t("compare_with")), ...options.map((option) => option.cloneNode(true)));
  $("model").value = choices.model;
  $("second").value = choices.second;
  const names = Object.keys(state.settings?.prompts ?? {});
  $("template").replaceChildren(h("option", { value: "" }, t("own_template", { name: own().template })), ...names.map((name) => h("option", {}, name)), h("option", { value: "text" }, t("as_it_is")));
  if (state.settings && ![...names, "text"].includes(choices.template)) choices.template = "";
}

function drawAll() {
  translate();
  drawChoosers();
  drawSettings();
  drawComposer();
  drawTalk();
  drawList();
  showHealth();
  $("language").textContent = LANGUAGES[(LANGUAGES.indexOf(language) + 1) % LANGUAGES.length] === "zh" ? "中文" : "English";
  const keys = [["Enter", "send"], ["Shift Enter", "new_line"], ["Esc", "stop"], ["Alt N", "new"], ["Alt 1…4", "modes"], ["Alt R", "regenerate"],
    ["Alt E", "edit_last"], ["Alt S", "settings"], ["/", "prompt"], ["← →", "tokens_label"], ["?", "shortcuts"]];
  $("help-list").replaceChildren(...keys.flatMap(([key, word]) => [h("dt", {}, ...key.split(" ").map((part) => h("kbd", {}, part))), h("dd", {}, t(word))]));
}

function showHealth() {
  const now = state.health;
  $("notice").hidden = !now;
  const words = now && ({ e_ready: t("preparing", now), e_away: t("away") }[now.word] ?? t(now.word, now.values));
  if (now) $("notice").replaceChildren(h("span", {}, words), now.all ? h("progress", { max: now.all, value: now.done, "aria-label": words }) : "");
}
function showKeyForm() {
  $("key-form").hidden = false;
  $("key").focus();
}

let watching = 0;
async function watch() {
  clearTimeout(watching);
  state.health = await health();
  if (!state.health && !state.settings) await connect();
  showHealth();
  if (state.health) watching = setTimeout(watch, 2000);
}

async function connect() {
  try {
    const [models, settings] = await Promise.all([read("v1/models"), read("page/settings")]);
    state.models = models.data.map(({ id }) => id);
    state.settings = settings;
    $("key-form").hidden = true;
    drawChoosers();
    setMode(choices.mode);
    drawAll();
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    if (error.word === "e_key") showKeyForm();
    else state.health = error;
  }
}

// --- what the user does -------------------------------------------------------------------------------------------------
const on = (id, kind, act) => $(id).addEventListener(kind, act);
const choose = (id, name, read_ = (node) => node.value, after = () => {}) =>
  on(id, "change", ({ target }) => { choices[name] = read_(target); keepChoices(); after(); });

on("composer", "submit", (event) => { event.preventDefault(); send(); });
on("composer", "keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.target.tagName === "BUTTON") return;
  if (event.target.tagName === "SELECT" || event.target.type === "checkbox") return;
  event.preventDefault();
  if (event.target.id === "schema-add") addToSchema(); else send();
});
on("stop", "click", () => state.running?.abort());
on("cancel-edit", "click", stopEditing);
on("molecule-text", "input", preview);
on("new", "click", () => { openTalk(newConversation()); $(FIELDS[choices.mode]).focus(); });
on("export", "click", () => download("jaxlm-conversations.json", exported()));
on("import", "click", () => $("import-file").click());
on("import-file", "change", async ({ target }) => {
  const count = imported(await target.files[0].text());
  target.value = "";
  toast(count === null ? t("import_wrong") : t("import_done", { count }));
  drawList();
});
on("preset", "change", ({ target }) => {
  const preset = state.settings.schemas.find(({ kind, name }) => kind === choices.kind && name.en === target.value);
  if (preset) setSchema(preset.schema[language]);
});
on("key-form", "submit", async (event) => { event.preventDefault(); setKey($("key").value); await connect(); if (!$("key-form").hidden) toast(t("e_key")); });
on("scroll", "scroll", ({ target }) => {
  state.follow = target.scrollHeight - target.scrollTop - target.clientHeight < 60;
  $("latest").hidden = state.follow;
});
on("latest", "click", toEnd);
on("fold", "click", () => fold(!document.body.classList.contains("folded")));
on("open-list", "click", () => panel("list", true));
on("close-list", "click", () => panel("list", false));
on("open-settings", "click", () => panel("settings", $("settings").hidden));
on("close-settings", "click", () => { panel("settings", false); $("open-settings").focus(); });
on("shade", "click", () => { panel("list", false); panel("settings", false); });
on("keys", "click", () => $("help").showModal());
on("reset", "click", () => { Object.assign(choices, { sampling: {}, seed: "", stops: "" }); keepChoices(); drawSettings(); });
on("language", "click", () => { choices.language = language === "zh" ? "en" : "zh"; keepChoices(); setLanguage(choices.language); drawAll(); });
on("theme", "click", () => {
  const { dataset } = document.documentElement, isDark = dataset.theme ? dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  choices.theme = dataset.theme = isDark ? "light" : "dark";
  keepChoices();
});
choose("model", "model", undefined, () => { drawChoosers(); setMode(choices.mode); });
choose("second", "second");
choose("template", "template", undefined, drawComposer);
choose("force", "force", (node) => node.checked);
choose("logprobs", "logprobs", (node) => node.checked);
for (const name of ["seed", "stops", "system"]) choose(name, name);

addEventListener("keydown", (event) => {
  const isTyping = /^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName), isPlain = !event.altKey && !event.ctrlKey && !event.metaKey;
  const withAlt = { KeyN: () => $("new").click(), KeyR: () => regenerate(), KeyE: () => state.talk.turns.length && edit(state.talk.turns.length - 1),
    KeyS: () => $("open-settings").click() };
  if (event.key === "Escape" && !event.isComposing) {
    if (isBusy()) state.running.abort(); else if (state.editing !== null) stopEditing(); else { panel("list", false); panel("settings", false); }
  } else if (event.altKey && !event.ctrlKey && /^Digit[1-4]$/.test(event.code)) setMode(MODES()[Number(event.code[5]) - 1] ?? choices.mode);
  else if (event.altKey && !event.ctrlKey && withAlt[event.code]) withAlt[event.code]();
  else if (isPlain && !isTyping && event.key === "?") $("help").showModal();
  else if (isPlain && !isTyping && event.key === "/") $(FIELDS[choices.mode]).focus();
  else return;
  if (event.key !== "Escape") event.preventDefault();
});
addEventListener("storage", drawList);
addEventListener("pagehide", () => { if (isBusy()) save(state.talk); });

setLanguage(choices.language || (navigator.language.startsWith("zh") ? "zh" : "en"));
const last = conversations().find(({ id }) => id === sessionStorage.getItem("jaxlm.open"));
drawAll();
if (last) openTalk(last);
watch();
