/**
 * Conversations, kept in this browser.
 *
 * A conversation is {id, revision, earlier, title, system, updated, turns}, a turn {question, answers, chosen}, an
 * answer {label, asked, text, steering, usage, reason, error}. Another tab may write too: `revision` tells
 * whether what is stored is what we know, `earlier` the revisions that it goes on from. A browser tells a tab a
 * moment late what another has written, so two that write at once overwrite each other: see `isLost`.
 */

const STORE = "densesteer.conversations";
const MOST = 100;
const EARLIER = 20; // revisions that a conversation remembers
const AT_ONCE = 5000; // milliseconds within which what is gone was overwritten, not deleted

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

/** A conversation of its own that begins like this one. */
export function branch(conversation, turns) {
  const { title, system } = conversation;
  return { ...fresh(), title, system, turns: structuredClone(turns) };
}

/**
 * Keep a conversation, the newest first; what does not fit goes from the oldest on. If another tab has gone
 * on with it, this one becomes a conversation of its own.
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

/** Tell whether another tab has written over this conversation without having seen it. */
export function isLost(conversation) {
  const { id, revision, updated } = conversation;
  if (!revision) return false; // never kept
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

/** Call `changed` when another tab has written. */
export function watch(changed) {
  addEventListener("storage", (event) => { if (event.key === STORE || event.key === null) changed(); });
}

/** The messages that the question of turn `before` follows: of each turn the chosen answer. */
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
