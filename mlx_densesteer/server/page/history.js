/**
 * Conversations, kept in this browser.
 *
 * A conversation is {id, revision, earlier, title, system, updated, turns}, a turn {question, answers, chosen}, an
 * answer {asked, system, model, vector, dose, at, text, steering, usage, starts, stated, brakes, reason, error}: `model` is the
 * server's then, `vector` the fingerprint. The answers of a turn stand by strength. Another tab may store a newer state:
 * `revision` names the stored state, `earlier` the revisions before it. A browser informs other tabs a moment
 * late, so two tabs that store at once overwrite each other: see `isLost`.
 */

import { standing } from "/page/words.js";

const STORE = "densesteer.conversations";
const MOST = 100;
const EARLIER = 20; // revisions kept per conversation
const AT_ONCE = 5000; // milliseconds: a conversation missing sooner was overwritten, not deleted

/** @returns {object[]} newest first */
export function all() {
  try {
    const found = JSON.parse(localStorage.getItem(STORE) ?? "[]");
    return Array.isArray(found) ? found.filter((one) => one?.id && Array.isArray(one.turns)) : [];
  } catch {
    return [];
  }
}

export function find(id) {
  return all().find((one) => one.id === id);
}

export function fresh() {
  return { id: name(), revision: null, title: "", system: "", updated: null, turns: [] };
}

/** A new conversation that begins with these turns. */
export function branch(conversation, turns) {
  const { title, system } = conversation;
  return { ...fresh(), title, system, turns: structuredClone(turns) };
}

/**
 * Store a conversation, the newest first; the oldest are dropped if there is no room. If another tab has
 * continued it, this one is stored as a new conversation.
 * @returns {boolean} false: it is too large
 */
export function keep(conversation) {
  if (!conversation.turns.length) return true;
  const others = all();
  const stored = others.find((one) => one.id === conversation.id);
  const known = [...(conversation.earlier ?? []), conversation.revision];
  if (stored && !known.includes(stored.revision)) conversation.id = name();
  const earlier = known.filter(Boolean).slice(-EARLIER);
  Object.assign(conversation, { revision: name(), earlier, title: title(conversation), updated: new Date().toISOString() });
  const kept = [conversation, ...others.filter((one) => one.id !== conversation.id)].slice(0, MOST);
  while (kept.length && !write(kept)) kept.pop();
  return kept.length > 0;
}

/** Tell whether another tab has overwritten this conversation without knowing its state. */
export function isLost(conversation) {
  const { id, revision, updated } = conversation;
  if (!revision) return false; // never stored
  const stored = find(id);
  if (!stored) return Date.now() - Date.parse(updated) < AT_ONCE;
  return stored.revision !== revision && !stored.earlier?.includes(revision);
}

/** Put back a conversation that was deleted. */
export function restore(conversation) {
  write([...all(), conversation].sort((a, b) => (b.updated ?? "").localeCompare(a.updated ?? "")));
}

export function remove(id) {
  write(all().filter((one) => one.id !== id));
}

export function removeAll() {
  localStorage.removeItem(STORE);
}

/** Call `changed` when another tab has stored something. */
export function watch(changed) {
  addEventListener("storage", (event) => { if (event.key === STORE || event.key === null) changed(); });
}

/** Put the answers of a turn in the order of their strength; `chosen` stays the same answer. */
export function arrange(turn) {
  const chosen = turn.answers[turn.chosen];
  turn.answers.sort((a, b) => standing(a) - standing(b));
  turn.chosen = Math.max(0, turn.answers.indexOf(chosen));
}

/** The messages before the question of turn `before`, with each turn's chosen answer. */
export function messages(conversation, before) {
  const said = conversation.system.trim() ? [{ role: "system", content: conversation.system }] : [];
  for (const turn of conversation.turns.slice(0, before)) {
    said.push({ role: "user", content: turn.question });
    const answer = turn.answers[turn.chosen];
    if (answer?.text) said.push({ role: "assistant", content: answer.text });
  }
  return said;
}

function title(conversation) {
  const question = conversation.turns[0].question.trim().replace(/\s+/g, " ");
  return question.length > 80 ? `${question.slice(0, 79).replace(/\s\S*$/, "")} …` : question;
}

function name() {
  return crypto.randomUUID?.() ?? `${Date.now()}-${Math.random()}`;
}

function write(conversations) {
  try {
    localStorage.setItem(STORE, JSON.stringify(conversations));
    return true;
  } catch {
    return false; // full
  }
}
