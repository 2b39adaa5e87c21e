/** A conversation as a file. */

import { make } from "/page/dom.js";
import { count, describe, steeringOf, stepsOf } from "/page/words.js";

const ENDS = { length: "cut off at the length limit", stopped: "stopped", error: "broken off" };

export function asMarkdown(conversation, server) {
  const lines = [`# ${conversation.title || "Conversation"}`, "", `Model: ${server.model.id}, mlx-densesteer ${server.version}`];
  if (conversation.updated) lines.push(`\nDate: ${conversation.updated}`);
  if (conversation.system) lines.push("", "System:", "", fenced(conversation.system));
  conversation.turns.forEach((turn, number) => {
    lines.push("", `## Question ${number + 1}`, "", turn.question);
    turn.answers.forEach((answer, index) => {
      const chosen = turn.answers.length > 1 && index === turn.chosen ? " (continued from here)" : "";
      lines.push("", `### ${describe(steeringOf(answer), true)}${chosen}`, "", fenced(answer.text), "", `*${receipt(answer)}*`);
    });
  });
  return `${lines.join("\n")}\n`;
}

export function asJson(conversation, server) {
  const { model, version } = server;
  const head = { format: "mlx-densesteer conversation", version: 2, model, server: version, exported: new Date().toISOString() };
  const { earlier, ...said } = conversation; // `earlier` is for this browser's tabs
  return `${JSON.stringify({ ...head, ...said }, null, 2)}\n`;
}

/** Offer a text as a download named after the conversation. */
export function download(text, conversation, ending, type) {
  const words = conversation.title.toLowerCase().match(/[\p{L}\p{N}]+/gu) ?? ["conversation"];
  const date = (conversation.updated ?? new Date().toISOString()).slice(0, 10);
  const link = make("a", {
    href: URL.createObjectURL(new Blob([text], { type })), download: `${words.slice(0, 6).join("-")}-${date}.${ending}`,
  });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

/** Fence a text with more backticks than it holds, so that it stays as the model wrote it. */
function fenced(text) {
  const longest = Math.max(2, ...(text.match(/`+/g) ?? []).map((run) => run.length));
  const fence = "`".repeat(longest + 1);
  return `${fence}text\n${text}\n${fence}`;
}

function receipt(answer) {
  const { usage, asked, reason, error, steering } = answer;
  const told = answer.model ? [`model ${answer.model.id}`] : [];
  if (usage) {
    const details = usage.completion_tokens_details;
    const { whole, literal } = stepsOf(answer);
    told.push(count(usage.completion_tokens, "token"), count(literal, "step"), `density ${details.density ?? "-"}`,
      `${details.tokens_per_second} tokens/s`);
    if (whole !== literal) told.push(`${count(whole, "step")} if code and lists are kept whole`);
  }
  for (const name of ["temperature", "top_p", "seed"]) if (asked?.[name]) told.push(`${name} ${asked[name]}`);
  if (steering) told.push(`strength ${steering.strength}`);
  if (steering?.fingerprint) told.push(`fingerprint ${steering.fingerprint}`);
  if (ENDS[reason]) told.push(error ? `${ENDS[reason]}: ${error}` : ENDS[reason]);
  return told.join(", ");
}
