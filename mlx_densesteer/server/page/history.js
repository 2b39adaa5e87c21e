/** Conversations, kept in this browser. */

const STORE = "densesteer.conversations";
const MOST = 100;

/**
 * A turn is {question, answers: [{label, text, steering, usage, reason, error}], chosen}.
 * @returns {{id: string, title: string, system: string, turns: object[]}[]} newest first
 */
export function all() {
  try {
    const found = JSON.parse(localStorage.getItem(STORE) ?? "[]");
    return Array.isArray(found) ? found.filter((one) => one?.id && Array.isArray(one.turns)) : [];
  } catch {
    return [];
  }
}

export function fresh() {
  return { id: crypto.randomUUID?.() ?? String(Date.now() + Math.random()), title: "", system: "", turns: [] };
}

/** Keep a conversation, the newest first; what does not fit goes from the oldest on. */
export function keep(conversation) {
  if (!conversation.turns.length) return;
  conversation.title = conversation.turns[0].question.slice(0, 60);
  const kept = [conversation, ...all().filter((one) => one.id !== conversation.id)].slice(0, MOST);
  while (kept.length) {
    try {
      localStorage.setItem(STORE, JSON.stringify(kept));
      return;
    } catch {
      kept.pop(); // full
    }
  }
}

export function remove(id) {
  localStorage.setItem(STORE, JSON.stringify(all().filter((one) => one.id !== id)));
}

export function removeAll() {
  localStorage.removeItem(STORE);
}

/** The messages that the next question follows: of each turn the chosen answer. */
export function messages(conversation) {
  const said = conversation.system.trim() ? [{ role: "system", content: conversation.system }] : [];
  for (const turn of conversation.turns) {
    said.push({ role: "user", content: turn.question });
    const answer = turn.answers[turn.chosen];
    if (answer?.text) said.push({ role: "assistant", content: answer.text });
  }
  return said;
}
