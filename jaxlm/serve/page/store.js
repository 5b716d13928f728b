// What the browser keeps: one entry for each conversation, so that two windows do not overwrite each other, and choices.
const PREFIX = "jaxlm.talk.";
const FORMAT = "jaxlm conversations 1";

export const choices = {
  mode: "chat", model: "", second: "", language: "", theme: "", template: "", system: "", kind: "RE", direction: "describe",
  logprobs: true, force: true, seed: "", stops: "", sampling: {}, schemas: {},
  ...JSON.parse(localStorage.getItem("jaxlm.page") || "{}"),
};
export const keepChoices = () => localStorage.setItem("jaxlm.page", JSON.stringify(choices));

export const newConversation = () => ({ id: crypto.randomUUID?.() ?? String(Math.random()).slice(2), changed: Date.now(), turns: [] });

export function conversations() {
  const keys = Object.keys(localStorage).filter((name) => name.startsWith(PREFIX));
  return keys.map((name) => JSON.parse(localStorage.getItem(name))).sort((a, b) => b.changed - a.changed);
}

// Keeps a conversation; where the browser's place is used up, token details of the oldest go first.
// Returns whether all of it could be kept.
export function keep(conversation) {
  const write = (content) => localStorage.setItem(PREFIX + content.id, JSON.stringify(content));
  const withoutTokens = (content) => ({
    ...content, turns: content.turns.map((turn) => ({ ...turn, answers: turn.answers.map((answer) => ({ ...answer, tokens: [] })) })),
  });
  const tries = [() => {}, ...conversations().reverse().map((old) => () => write(withoutTokens(old)))];
  for (const makePlace of tries) {
    try {
      makePlace();
      write(conversation);
      return true;
    } catch (error) {
      if (error.name !== "QuotaExceededError") throw error;
    }
  }
  return false;
}
export const forget = (id) => localStorage.removeItem(PREFIX + id);

export const exported = () => JSON.stringify({ format: FORMAT, conversations: conversations() }, null, 1);

const isAnswer = (answer) => typeof answer?.text === "string" && typeof answer.model === "string" && Array.isArray(answer.tokens);
const isTurn = (turn) => typeof turn?.ask?.mode === "string" && typeof turn.ask.text === "string" && Array.isArray(turn.answers)
  && turn.answers.every(isAnswer);

// Takes an exported file; conversations that are here already stay. Returns how many are new, null: it is another file.
export function imported(text) {
  let content;
  try {
    content = JSON.parse(text);
  } catch {
    return null;
  }
  const talks = content?.format === FORMAT ? content.conversations : null;
  if (!Array.isArray(talks) || !talks.every((talk) => typeof talk?.id === "string" && talk.turns?.every?.(isTurn))) return null;
  const fresh = talks.filter((talk) => localStorage.getItem(PREFIX + talk.id) === null);
  fresh.forEach(keep);
  return fresh.length;
}
