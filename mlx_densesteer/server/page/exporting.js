/** A conversation as a file. */

import { splitSteps } from "/page/steps.js";

export function describe(steering) {
  if (!steering) return "unsteered";
  const layers = steering.layers.length > 1 ? "layers" : "layer";
  return `${steering.vector} ${steering.strength}, ${layers} ${steering.layers.join(", ")}, ${steering.positions}`;
}

export function asMarkdown(conversation, model) {
  const lines = [`# ${conversation.title || "Conversation"}`, "", `Model: ${model}`];
  if (conversation.system) lines.push("", `System: ${conversation.system}`);
  conversation.turns.forEach((turn, number) => {
    lines.push("", `## Question ${number + 1}`, "", turn.question);
    turn.answers.forEach((answer, index) => {
      const chosen = turn.answers.length > 1 && index === turn.chosen ? " (gone on with)" : "";
      lines.push("", `### ${describe(answer.steering)}${chosen}`, "", answer.text, "", receipt(answer));
    });
  });
  return `${lines.join("\n")}\n`;
}

export function asJson(conversation, model) {
  return `${JSON.stringify({ format: "mlx-densesteer conversation", version: 1, model, ...conversation }, null, 2)}\n`;
}

/** Offer a text as a download. */
export function download(text, name, type) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

function receipt(answer) {
  const steps = splitSteps(answer.text).length;
  const usage = answer.usage;
  if (!usage) return `*${steps} steps; not finished*`;
  const details = usage.completion_tokens_details;
  return `*${usage.completion_tokens} tokens, ${details.steps} steps, density ${details.density ?? "-"}, ` +
    `${details.tokens_per_second} tokens/s*`;
}
