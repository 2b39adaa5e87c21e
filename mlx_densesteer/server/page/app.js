/** The page: a conversation, the dial, and the unsteered answer beside the steered one. */

import { Refused, answer as ask, overview, useKey } from "/page/api.js";
import { Dial } from "/page/dial.js";
import { asJson, asMarkdown, describe, download } from "/page/exporting.js";
import * as history from "/page/history.js";
import { count } from "/page/steps.js";
import { showSweep } from "/page/sweep.js";
import { themed } from "/page/theme.js";
import { make, showTurn } from "/page/transcript.js";

const element = (id) => document.getElementById(id);

let model = null;
let dial = null;
let conversation = history.fresh();
let running = null; // what stops the answers that stream

async function start() {
  themed(element("theme"));
  if (innerWidth < 768) for (const id of ["past", "steer"]) element(id).open = false;
  else if (innerWidth < 1120) element("past").open = false;
  wire();
  showConversation();
  await connect();
}

/** Ask the server what there is; the page is of use only after that. */
async function connect() {
  try {
    const found = await overview();
    model = found.model;
    element("model").textContent = `${model.id}, ${count(model.layers, "layer")}, ${model.dtype}`;
    element("max-tokens").max = model.max_tokens;
    element("max-tokens").value = Math.min(512, model.max_tokens);
    let shown;
    dial = new Dial(found, () => {
      if (dial?.vector && dial.vector !== shown) showSweep((shown = dial.vector), (setting) => dial.set(setting));
    });
    dial.changed();
    element("key-form").hidden = true;
    quiet();
  } catch (error) {
    fail(error, connect);
  }
}

/** Ask a question, or the last one again. */
async function send(question) {
  if (running || !dial) return;
  quiet();
  const here = conversation; // another may be opened while this one is answered
  here.system = element("system").value;
  const steering = dial.steering;
  const settings = steering && element("compare").checked ? [steering, null] : [steering];
  const request = {
    model: model.id, messages: [...history.messages(here), { role: "user", content: question }],
    max_tokens: Number(element("max-tokens").value) || 512, temperature: Number(element("temperature").value) || 0,
  };
  const turn = {
    question, chosen: 0,
    answers: settings.map((one) => ({ label: describe(one), text: "", reason: undefined })),
  };
  here.turns.push(turn);
  element("empty").hidden = true;
  const views = showTurn(element("turns"), turn, (index) => choose(here, turn, views, index));
  element("turns").lastChild.scrollIntoView({ block: "end" });
  busy(new AbortController());
  const { signal } = running;
  const mine = running;
  await Promise.all(settings.map((one, index) =>
    follow(one ? { ...request, steering: one } : request, turn.answers[index], views[index], signal)));
  if (running === mine) busy(null);
  finish(here, turn);
}

/** Fill one answer from its stream. */
async function follow(request, answer, view, signal) {
  let drawing = 0;
  const draw = () => { drawing = 0; view.update(); };
  try {
    for await (const piece of ask(request, signal)) {
      if (piece.text) answer.text += piece.text;
      if (piece.reason) answer.reason = piece.reason;
      if (piece.usage) answer.usage = piece.usage;
      if (piece.steering !== undefined) answer.steering = piece.steering;
      drawing ||= requestAnimationFrame(draw);
    }
  } catch (error) {
    answer.reason = error.name === "AbortError" ? "stopped" : "error";
    if (answer.reason === "error") answer.error = error.message;
    answer.status = error instanceof Refused ? error.status : undefined;
  }
  cancelAnimationFrame(drawing);
  view.update();
}

/** Keep the turn, and tell those who cannot see what came. */
function finish(here, turn) {
  const failed = turn.answers.find((one) => one.error);
  const said = turn.answers.some((one) => one.text);
  if (said) history.keep(here);
  else here.turns.pop();
  if (here !== conversation) {
    showList();
    return;
  }
  if (!said) {
    element("turns").lastChild.remove();
    element("question").value ||= turn.question;
    showEmpty();
  }
  if (failed) fail(new Refused(failed.error, failed.status ?? 500), said ? again : () => send(takeQuestion()));
  else {
    const told = turn.answers.map((one) =>
      `${one.label}: ${one.usage ? count(one.usage.completion_tokens, "token") : "stopped"}`);
    element("status").textContent = `Answered. ${told.join("; ")}.`;
  }
  showList();
}

function takeQuestion() {
  const question = element("question").value;
  element("question").value = "";
  return question;
}

/** Answer the last question again, under what the dial says now. */
function again() {
  const last = conversation.turns.pop();
  if (!last) return;
  element("turns").lastChild.remove();
  send(last.question);
}

function choose(here, turn, views, index) {
  turn.chosen = index;
  views.forEach((view, number) => view.setChosen(number === index));
  history.keep(here);
}

function busy(controller) {
  running = controller;
  element("send").disabled = Boolean(controller);
  element("stop").hidden = !controller;
  element("again").disabled = Boolean(controller) || !conversation.turns.length;
  if (controller) element("status").textContent = "Answering.";
}

function fail(error, retry) {
  element("alert").hidden = false;
  element("alert-text").textContent = error.message;
  element("retry").onclick = () => { quiet(); retry(); };
  element("key-form").hidden = error.status !== 401;
  if (error.status === 401) element("key").focus();
}

function quiet() {
  element("alert").hidden = true;
}

function showConversation() {
  element("turns").replaceChildren();
  for (const turn of conversation.turns) {
    const views = showTurn(element("turns"), turn, (index) => choose(conversation, turn, views, index));
  }
  element("system").value = conversation.system;
  showEmpty();
  busy(null);
  showList();
}

function showEmpty() {
  element("empty").hidden = conversation.turns.length > 0;
}

function showList() {
  const open = (one) => { stop(); conversation = one; quiet(); showConversation(); };
  const forget = (one) => { history.remove(one.id); if (one.id === conversation.id) renew(); else showList(); };
  element("conversations").replaceChildren(...history.all().map((one) => {
    const button = make("button", { type: "button", className: "open", textContent: one.title, onclick: () => open(one) });
    button.setAttribute("aria-current", String(one.id === conversation.id));
    const remove = make("button", { type: "button", className: "delete", textContent: "✕", onclick: () => forget(one) });
    remove.setAttribute("aria-label", `Delete ${one.title}`);
    return make("li", {}, button, remove);
  }));
  for (const id of ["export-markdown", "export-json"]) element(id).disabled = !conversation.turns.length;
}

function renew() {
  stop();
  conversation = history.fresh();
  quiet();
  showConversation();
  element("question").focus();
}

function stop() {
  running?.abort();
  busy(null);
}

function wire() {
  const question = element("question");
  element("composer").onsubmit = (event) => {
    event.preventDefault();
    if (!running && question.value.trim()) send(takeQuestion());
  };
  question.onkeydown = (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    element("composer").requestSubmit();
  };
  addEventListener("keydown", (event) => { if (event.key === "Escape") stop(); });
  element("stop").onclick = stop;
  element("again").onclick = again;
  element("new").onclick = renew;
  element("forget").onclick = () => { history.removeAll(); renew(); };
  element("export-markdown").onclick = () => download(asMarkdown(conversation, model?.id), "conversation.md", "text/markdown");
  element("export-json").onclick = () => download(asJson(conversation, model?.id), "conversation.json", "application/json");
  element("key-form").onsubmit = (event) => {
    event.preventDefault();
    useKey(element("key").value);
    element("key").value = "";
    connect();
  };
}

start();
