/** The page: a conversation, the dial, and the unsteered answer beside the steered one. */

import { Refused, answer as ask, hasKey, models, overview, useKey } from "/page/api.js";
import { Dial } from "/page/dial.js";
import { element, fill, make, toast } from "/page/dom.js";
import { asJson, asMarkdown, download } from "/page/exporting.js";
import * as history from "/page/history.js";
import { closeOverlays, wirePanels } from "/page/panels.js";
import { forgetAll, showPast } from "/page/past.js";
import { remember, remembered, sampling, wireSettings } from "/page/settings.js";
import { Sweep } from "/page/sweep.js";
import { themed } from "/page/theme.js";
import { MEANING, Transcript } from "/page/transcript.js";
import { circumstances, count, describe, steeringOf } from "/page/words.js";

const ALREADY = "Answered already: the answers of this setting are shown.";
const [HERE, DRAFT] = ["densesteer.open", "densesteer.draft"]; // in this tab

let server = null; // the overview; null until it has come
let dial = null;
let conversation = history.fresh();
let connecting = false; // the overview is on its way
let running = null; // aborts the answers that stream
const sweep = new Sweep((setting) => dial.set(setting));
const transcript = new Transcript({ choose, branch });

async function start() {
  themed(element("theme"));
  wirePanels();
  wireSettings(() => transcript.setPlain(element("plain").checked));
  transcript.setPlain(element("plain").checked);
  wire();
  conversation = history.find(sessionStorage.getItem(HERE)) ?? conversation;
  element("question").value = sessionStorage.getItem(DRAFT) ?? "";
  showConversation();
  await connect();
}

/** Load the overview of the server's model, or of the chosen one; questions can be sent after that. */
async function connect() {
  dial = null;
  connecting = true;
  busy(running);
  element("model").textContent = "loading …";
  try {
    const several = choice(await models());
    server = await overview(several);
    const { model } = server;
    element("model").textContent = `${several ? "" : `${model.id}, `}${count(model.layers, "layer")}, ${model.dtype}`;
    element("max-tokens").max = model.max_tokens;
    element("max-tokens").onchange();
    dial = new Dial(server, remembered()[`dial ${model.id}`], (setting) => {
      if (!dial) return;
      sweep.show(dial.vector, setting);
      remember(`dial ${model.id}`, { ...setting, fingerprint: dial.vector.fingerprint });
    });
    transcript.model = model;
    transcript.named = server.vectors.length > 1;
    transcript.refresh();
    sweep.show(server.vectors.length ? dial.vector : null, dial.setting);
    showExamples();
    element("key-form").hidden = true;
    quiet();
  } catch (error) {
    element("model").textContent = error.status === 401 ? "locked" : "not connected";
    fail(error, connect);
  }
  connecting = false;
  busy(running);
}

/** Show the models to choose from, and return the chosen one; null: there is only one. */
function choice(all) {
  const chooser = element("choose");
  chooser.hidden = all.length < 2;
  if (chooser.hidden) return null;
  const kept = all.find((one) => one.id === remembered().model) ?? all.find((one) => one.loaded) ?? all[0];
  fill(chooser, all.map((one) => one.id));
  chooser.value = kept.id;
  return kept.id;
}

function showExamples() {
  element("note").hidden = !server.note;
  element("note").textContent = server.note ?? "";
  element("examples").replaceChildren(...server.examples.map((text) =>
    make("button", { type: "button", textContent: text, onclick: () => send(text) })));
}

/** The steerings to ask for: the dial's, and none beside it. */
function wished() {
  const { steering } = dial;
  return steering && element("compare").checked ? [null, steering] : [steering];
}

/** Ask a question. @param {string} question @param {(object | null)[]} steerings */
function send(question, steerings = wished()) {
  if (running || !dial) return;
  run({ question, answers: [], chosen: 0 }, steerings.map(asked), dial.steering);
}

/** Answer the last question under more steerings; an answer that is there already is not asked for again. */
function again(steerings = wished()) {
  const turn = conversation.turns.at(-1);
  if (running || !dial || !turn) return;
  run(turn, steerings.map(asked), dial.steering);
}

/** Ask what is written, else the last question again, under five strengths. */
function five() {
  const question = element("question").value.trim();
  if (running || !dial) return;
  if (question) send(takeQuestion(), dial.five);
  else again(dial.five);
}

/** The fields of a request beside its messages. */
function asked(steering) {
  return { ...sampling(), steering };
}

/** An answer that has not come yet: what is asked, and of which model and vector. */
function unanswered(asked, system) {
  const { id, fingerprint, dtype, quantization } = server.model;
  const { steering } = asked;
  const vector = server.vectors.find((one) => one.name === steering?.vector)?.fingerprint;
  const dose = steering && dial.dose(steering);
  return { asked, system, model: { id, fingerprint, dtype, quantization }, vector, dose, at: new Date().toISOString(), text: "" };
}

/** What makes the requests of two answers equal; null: they never are, since each draws its own sample. */
function sameness(answer) {
  const { steering, temperature, seed } = answer.asked;
  if (temperature && seed === undefined) return null;
  const { vector, strength, layers, positions } = steering ?? {};
  const exact = strength && Number(strength.toPrecision(6));
  return JSON.stringify([vector, answer.vector, exact, layers, positions, circumstances(answer)]);
}

const isWhole = (answer) => answer.reason === "stop" || answer.reason === "length";

/** The answer of a turn to the same request, if it is complete. */
function known(turn, answer) {
  const key = sameness(answer);
  return turn.answers.find((other) => key !== null && sameness(other) === key &&
    (other.reason === "stop" || (isWhole(other) && other.asked.max_tokens === answer.asked.max_tokens)));
}

/** The answer whose strength is nearest to that of a steering. */
function nearest(answers, steering) {
  const apart = ({ asked }) => Math.abs((asked.steering?.strength ?? 0) - (steering?.strength ?? 0));
  return answers.reduce((best, one) => (apart(one) < apart(best) ? one : best));
}

/**
 * Add these answers to a turn, all at once: the server makes them in one batch.
 * @param {object[]} wanted requests @param {object | null} main the steering whose answer is continued from
 */
async function run(turn, wanted, main) {
  quiet();
  const here = conversation; // the user may open another one meanwhile
  const system = element("system").value;
  const fresh = wanted.map((one) => unanswered(one, system));
  const answers = fresh.filter((one) => !known(turn, one));
  const chosen = known(turn, unanswered(asked(main), system)) ?? nearest(fresh.map((one) => known(turn, one) ?? one), main);
  if (!answers.length) {
    turn.chosen = turn.answers.indexOf(chosen);
    transcript.refresh();
    transcript.toChosen(turn);
    history.keep(here);
    element("status").textContent = ALREADY;
    toast(ALREADY);
    return;
  }
  here.system = system;
  if (!here.turns.includes(turn)) here.turns.push(turn);
  const messages = [...history.messages(here, here.turns.indexOf(turn)), { role: "user", content: turn.question }];
  const before = turn.answers[turn.chosen];
  const keys = answers.map(sameness);
  const replaced = turn.answers.filter((one) => keys.includes(sameness(one) ?? NaN)); // unfinished, or cut off
  turn.answers = [...turn.answers, ...answers].filter((one) => !replaced.includes(one));
  replaced.forEach((one) => transcript.dropAnswer(one));
  turn.chosen = turn.answers.indexOf(chosen);
  history.arrange(turn);
  transcript.add(turn);
  transcript.refresh();
  transcript.toChosen(turn);
  if (turn.answers.length > 2) transcript.toTop(turn);
  else transcript.toEnd();
  showSystem();
  busy(new AbortController());
  const mine = running;
  await Promise.all(answers.map((one) => follow({ model: server.model.id, messages }, one, mine.signal)));
  if (running === mine) busy(null);
  finish(here, turn, answers, { before, replaced });
}

/** Fill one answer from its stream. */
async function follow(request, answer, signal) {
  const { steering, ...rest } = answer.asked;
  let drawing = 0;
  const draw = () => { drawing = 0; transcript.update(answer); };
  try {
    for await (const piece of ask({ ...request, ...rest, ...(steering ? { steering } : {}) }, signal)) {
      if (piece.text) answer.text += piece.text;
      if (piece.thought) answer.thought = (answer.thought ?? "") + piece.thought;
      if (piece.reason) answer.reason = piece.reason;
      if (piece.usage) answer.usage = piece.usage;
      if (piece.starts) Object.assign(answer, { starts: piece.starts, stated: piece.stated });
      if (piece.brakes) answer.brakes = piece.brakes;
      if (piece.steering !== undefined) answer.steering = piece.steering;
      drawing ||= requestAnimationFrame(draw);
    }
  } catch (error) {
    answer.reason = error.name === "AbortError" ? "stopped" : "error";
    if (answer.reason === "error") answer.error = error.message;
    answer.status = error instanceof Refused ? error.status : undefined;
  }
  cancelAnimationFrame(drawing);
  transcript.update(answer);
}

/** Keep the answers, but for one that is not whole what it replaced, and offer to retry those that failed. */
function finish(here, turn, answers, { before, replaced }) {
  const failed = answers.filter((one) => one.error);
  const replaces = (one) => replaced.some((other) => sameness(other) === sameness(one));
  const empty = answers.filter((one) => !isWhole(one) && (!one.text || replaces(one)));
  if (empty.length) {
    const chosen = empty.includes(turn.answers[turn.chosen]) ? before : turn.answers[turn.chosen];
    const keys = empty.map(sameness);
    const back = replaced.filter((one) => keys.includes(sameness(one)));
    turn.answers = [...turn.answers.filter((one) => !empty.includes(one)), ...back];
    turn.chosen = Math.max(0, turn.answers.indexOf(chosen));
    history.arrange(turn);
  }
  const gone = !turn.answers.length;
  if (gone) here.turns = here.turns.filter((one) => one !== turn);
  const fits = history.keep(here);
  if (here === conversation) {
    empty.forEach((one) => transcript.dropAnswer(one));
    if (!gone) transcript.add(turn);
    else {
      transcript.drop(turn);
      transcript.turns = here.turns;
      element("question").value ||= turn.question;
    }
    tellEnd(turn, answers, failed, fits);
    sessionStorage.setItem(HERE, here.id);
    transcript.refresh();
    busy(running);
  }
  showList();
}

/** Announce the answers to screen readers, or show what failed. */
function tellEnd(turn, answers, failed, fits) {
  if (failed.length) {
    const retry = () => {
      if (element("question").value === turn.question) element("question").value = "";
      run(turn, failed.map((one) => one.asked), failed.at(-1).asked.steering);
    };
    fail(new Refused(failed[0].error, failed[0].status ?? 500), retry);
  } else if (!fits) fail(new Refused("This conversation is too large to store in this browser.", 0), () => {});
  else {
    const said = turn.answers[turn.chosen]?.text ?? "";
    const told = answers.map((one) => `${describe(steeringOf(one))}: ${one.usage ? count(one.usage.completion_tokens, "token") : "stopped"}`);
    element("status").textContent = `Answered. ${told.join("; ")}. ${said.length > 600 ? `${said.slice(0, 600)} …` : said}`;
  }
}

function takeQuestion() {
  const question = element("question").value;
  element("question").value = "";
  readyFive();
  return question;
}

/** Continue from another answer to the last question. */
function choose(turn, index) {
  turn.chosen = index;
  transcript.refresh();
  if (!running) history.keep(conversation);
  element("question").focus();
}

/** Continue from an answer to an earlier question, in a new conversation. */
function branch(turn, index) {
  const until = conversation.turns.slice(0, conversation.turns.indexOf(turn) + 1);
  const made = history.branch(conversation, until);
  made.turns.at(-1).chosen = index;
  open(made);
  history.keep(made);
  showList();
  element("question").focus();
}

function busy(controller) {
  running = controller;
  const focused = document.activeElement === element("stop");
  element("send").disabled = !dial;
  element("send").hidden = Boolean(controller);
  element("choose").disabled = Boolean(controller) || connecting;
  for (const id of ["strength", "strength-number", "zero"]) element(id).disabled = !dial;
  element("stop").hidden = !controller;
  element("again").disabled = Boolean(controller) || !dial || !conversation.turns.length;
  readyFive();
  for (const id of ["export-markdown", "export-json"]) element(id).disabled = !server || !conversation.turns.length;
  if (controller) element("status").textContent = "Answering.";
  if (focused && !controller) element("question").focus();
}

/** Five strengths need a vector, and a question: a new one or the last. */
function readyFive() {
  const asks = element("question").value.trim() || conversation.turns.length;
  element("five").disabled = Boolean(running) || !dial?.five.length || !asks;
}

/** Show the system message that the conversation has. */
function showSystem() {
  const place = element("told-system");
  place.hidden = !conversation.system.trim();
  place.lastElementChild.textContent = conversation.system;
}

function fail(error, retry) {
  const locked = error.status === 401;
  element("key-form").hidden = !locked;
  element("alert").hidden = locked;
  element("alert-text").textContent = error.message;
  element("retry").onclick = () => { quiet(); retry(); };
  if (!locked) return;
  element("key-text").textContent = hasKey() ? "The server refused that key." : "This server asks for its API key.";
  element("key").focus();
}

function quiet() {
  element("alert").hidden = true;
}

/** Show another conversation; the answers of this one stop. */
function open(other) {
  if (other.id === conversation.id) return;
  stop();
  conversation = other;
  quiet();
  showConversation();
}

function showConversation() {
  sessionStorage.setItem(HERE, conversation.id);
  conversation.turns.forEach(history.arrange);
  transcript.show(conversation.turns);
  showSystem();
  element("system").value = conversation.system;
  busy(null);
  showList();
}

function showList() {
  showPast(conversation.id, (one) => { open(one); closeOverlays(); }, (id) => {
    if (id === conversation.id) renew();
    else showList();
  });
}

function renew() {
  open(history.fresh());
  closeOverlays();
  element("question").focus();
}

/** Show what another tab has stored, unless an answer is streaming here. */
function adopt() {
  if (!running && history.isLost(conversation)) {
    history.keep(conversation);
    sessionStorage.setItem(HERE, conversation.id);
  }
  showList();
  if (running) return;
  const stored = history.find(conversation.id);
  if (!stored && conversation.revision) open(history.fresh());
  else if (stored && stored.revision !== conversation.revision) {
    conversation = stored;
    showConversation();
  }
}

function stop() {
  running?.abort();
  busy(null);
}

function wire() {
  const question = element("question");
  element("composer").onsubmit = (event) => {
    event.preventDefault();
    if (!running && dial && question.value.trim()) send(takeQuestion());
  };
  question.onkeydown = (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    element("composer").requestSubmit();
  };
  addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !document.querySelector("dialog[open]") && !closeOverlays()) stop();
  });
  addEventListener("pagehide", () => sessionStorage.setItem(DRAFT, question.value));
  element("stop").onclick = stop;
  element("choose").onchange = () => { remember("model", element("choose").value); connect(); };
  element("again").onclick = () => again();
  element("five").onclick = five;
  question.addEventListener("input", readyFive);
  element("meanings").replaceChildren(...Object.entries(MEANING).flatMap(([name, meaning]) =>
    [make("dt", { textContent: name }), make("dd", { textContent: meaning })]));
  element("new").onclick = renew;
  element("forget").onclick = () => forgetAll(renew);
  element("export-markdown").onclick = () => download(asMarkdown(conversation, server), conversation, "md", "text/markdown");
  element("export-json").onclick = () => download(asJson(conversation, server), conversation, "json", "application/json");
  element("key-form").onsubmit = (event) => {
    event.preventDefault();
    useKey(element("key").value);
    element("key").value = "";
    connect();
  };
  history.watch(adopt);
}

start();
