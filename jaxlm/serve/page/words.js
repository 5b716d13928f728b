// Every text of the page, in both languages: words.json holds key: [English, 中文]; {name} is filled in.
export const LANGUAGES = ["en", "zh"];
export let language = "en";
const WORDS = await (await fetch("page/words.json")).json();


export const inLanguage = (key, name) => WORDS[key][LANGUAGES.indexOf(name)];
export const t = (key, values = {}) => inLanguage(key, language).replace(/\{(\w+)\}/g, (_, name) => values[name]);
export function setLanguage(name) {
  language = LANGUAGES.includes(name) ? name : "en";
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
}

// Fills in the texts, names and hints that index.html asks for.
export function translate() {
  for (const node of document.querySelectorAll("[data-t]")) node.textContent = t(node.dataset.t);
  for (const node of document.querySelectorAll("[data-hint]")) node.placeholder = t(node.dataset.hint);
  for (const node of document.querySelectorAll("[data-label]")) {
    node.setAttribute("aria-label", t(node.dataset.label));
    if (node.tagName === "BUTTON") node.title = t(node.dataset.label);
  }
}
