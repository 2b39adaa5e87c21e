/** Turns and answers on the page, and the scrolling through them. */

import { copyButton, element, make } from "/page/dom.js";
import { blocks } from "/page/markup.js";
import { brief, changed, circumstances, count, describe, identity, steeringOf, stepsOf } from "/page/words.js";

const NEAR = 80; // the page follows new text within this many pixels of the end
const UPWARD = new Set(["ArrowUp", "PageUp", "Home"]);

/**
 * @typedef {{choose: (turn: object, index: number) => void, branch: (turn: object, index: number) => void}} Actions
 */
export class Transcript {
  /** @param {Actions} actions */
  constructor(actions) {
    this.actions = actions;
    this.plain = false;
    this.model = null; // the server's
    this.named = false; // several vectors: a heading names its own
    this.views = new Map(); // answer -> its view
    this.places = new Map(); // turn -> its element
    this.turns = [];
    this.following = true;
    this.top = 0; // where the page last saw or put the scroller
    const scroller = element("scroll");
    scroller.addEventListener("scroll", () => this.look());
    // on the event, not on the movement: a new token may move the scroller back to the end
    scroller.addEventListener("wheel", (event) => { if (event.deltaY < 0) this.leave(); }, { passive: true });
    scroller.addEventListener("keydown", (event) => { if (UPWARD.has(event.key)) this.leave(); });
    new ResizeObserver(() => this.follow()).observe(scroller);
    element("newest").onclick = () => this.toEnd();
  }

  /** Show a conversation from its end. */
  show(turns) {
    this.turns = turns;
    this.views.clear();
    this.places.clear();
    element("turns").replaceChildren();
    turns.forEach((turn) => this.add(turn));
    this.refresh();
    turns.forEach((turn) => this.toChosen(turn));
    this.toEnd();
  }

  /** Show a new turn at the end, or the new answers of a turn. */
  add(turn) {
    let place = this.places.get(turn);
    if (!place) {
      const asked = make("h2", { className: "asked" }, make("span", { className: "sr", textContent: "You asked: " }), turn.question);
      const overview = make("table", { className: "overview" });
      const answers = make("div", { className: "answers" });
      answers.setAttribute("role", "group");
      answers.setAttribute("aria-label", "Answers, by strength");
      place = make("li", {}, asked, make("div", { className: "table" }, overview), answers);
      this.places.set(turn, place);
      element("turns").append(place);
    }
    const list = place.lastChild;
    turn.answers.forEach((answer, index) => {
      let view = this.views.get(answer);
      if (!view) {
        view = new AnswerView(answer, turn, this, () => {
          const now = turn.answers.indexOf(answer);
          if (turn === this.turns.at(-1)) this.actions.choose(turn, now);
          else this.actions.branch(turn, now);
        });
        this.views.set(answer, view);
      }
      if (list.children[index] !== view.element) list.insertBefore(view.element, list.children[index] ?? null);
    });
  }

  /** Scroll sideways to the answer that the conversation continues from. */
  toChosen(turn) {
    const answer = turn.answers[turn.chosen];
    this.reveal(answer);
  }

  reveal(answer) {
    const view = this.views.get(answer)?.element;
    const list = view?.parentElement;
    if (list) list.scrollTo({ left: view.offsetLeft - list.offsetLeft - (list.clientWidth - view.offsetWidth) / 2 });
  }

  drop(turn) {
    this.places.get(turn)?.remove();
    this.places.delete(turn);
  }

  dropAnswer(answer) {
    this.views.get(answer)?.element.remove();
    this.views.delete(answer);
  }

  /** Show the current state of an answer. */
  update(answer) {
    const view = this.views.get(answer);
    view?.update();
    if (view && answer.reason) this.compare(view.turn);
    this.follow();
  }

  /** Show what steering changed: under each steered answer, and in a table of all. */
  compare(turn) {
    turn.answers.forEach((answer) => this.views.get(answer)?.showChange());
    showOverview(this.places.get(turn)?.querySelector(".overview"), turn, this);
  }

  /** The heading of an answer; a second answer of one setting is numbered. */
  heading(answer, turn) {
    const title = describe(steeringOf(answer), this.named);
    const alike = turn.answers.filter((one) => describe(steeringOf(one), this.named) === title);
    return alike.length > 1 && alike[0] !== answer ? `${title} (${alike.indexOf(answer) + 1})` : title;
  }

  /** Show which answers the conversation continues from, and the buttons of the others. */
  refresh() {
    element("empty").hidden = this.turns.length > 0;
    for (const turn of this.turns) {
      const last = turn === this.turns.at(-1);
      turn.answers.forEach((answer, index) => {
        const view = this.views.get(answer);
        view?.setPlace(turn.answers.length > 1 && index === turn.chosen, index === turn.chosen, last);
        view?.showHead();
      });
      this.compare(turn);
    }
  }

  /** @param {boolean} plain show the text as the model wrote it */
  setPlain(plain) {
    this.plain = plain;
    this.views.forEach((view) => view.redraw());
  }

  /** Show a turn from its question on, with the table of its answers. */
  toTop(turn) {
    const scroller = element("scroll");
    this.following = false;
    scroller.scrollTop += this.places.get(turn).getBoundingClientRect().top - scroller.getBoundingClientRect().top;
    this.top = scroller.scrollTop;
    this.look();
  }

  toEnd() {
    this.following = true;
    this.follow();
    this.look();
  }

  follow() {
    const scroller = element("scroll");
    if (this.following) {
      scroller.scrollTop = scroller.scrollHeight;
      this.top = scroller.scrollTop;
    } else this.look();
  }

  /** Stop following: the reader scrolls up. */
  leave() {
    if (element("scroll").scrollTop > 0) this.following = false;
    this.look();
  }

  /** Stop following once the reader has scrolled up, and follow again at the end. */
  look() {
    const { scrollTop, scrollHeight, clientHeight } = element("scroll");
    const gap = scrollHeight - clientHeight - scrollTop;
    if (gap >= NEAR && scrollTop < this.top) this.following = false;
    const ended = gap < 1 && scrollTop < this.top; // the text has become shorter
    if (ended || (gap < NEAR && scrollTop > this.top)) this.following = true;
    this.top = scrollTop;
    element("newest").hidden = this.following;
  }
}

/** One answer: its steps as they come, what steering changed, and its figures. */
class AnswerView {
  constructor(answer, turn, transcript, goOn) {
    Object.assign(this, { answer, turn, transcript });
    this.title = make("h3");
    this.sampling = make("p", { className: "hint sampling" });
    this.steps = make("ol", { className: "steps" });
    this.waiting = make("p", { className: "waiting", textContent: "Waiting for the first token …", hidden: true });
    this.thoughtTitle = make("summary");
    this.thoughtText = make("p");
    this.thought = make("details", { className: "thought", hidden: true }, this.thoughtTitle, this.thoughtText);
    this.headline = make("p", { className: "headline", hidden: true });
    this.detail = make("p", { className: "detail", hidden: true });
    this.note = make("p", { className: "note", hidden: true });
    this.receipt = make("dl", { className: "receipt", hidden: true });
    this.badge = make("span", { className: "badge", textContent: "✓ Continues from this one" });
    this.button = make("button", { type: "button", onclick: goOn });
    this.help = make("button", { type: "button", className: "quiet help", textContent: "?", hidden: true, onclick: () => element("figures").showModal() });
    this.help.setAttribute("aria-label", "What the figures mean");
    this.copy = copyButton(() => answer.text, "Copy");
    this.element = make("article", { className: "answer" }, make("div", { className: "head" }, this.title, this.copy),
      this.sampling, this.thought, this.steps, this.waiting, this.headline, this.detail, this.note, this.receipt,
      make("div", { className: "row" }, this.badge, this.button, this.help));
    this.update();
  }

  setPlace(marked, chosen, last) {
    this.element.classList.toggle("chosen", marked);
    this.badge.hidden = !marked;
    this.button.hidden = last ? chosen : !this.answer.text;
    this.button.textContent = last ? "Continue from this one" : "Branch from here";
  }

  redraw() {
    this.steps.replaceChildren();
    this.update();
  }

  /** Show the answer so far; only changed parts are rebuilt. */
  update() {
    const { answer } = this;
    this.showHead();
    const steps = cut(answer.text, answer.starts);
    this.steps.classList.toggle("counted", Boolean(answer.starts));
    while (this.steps.children.length > steps.length) this.steps.lastChild.remove();
    steps.forEach((step, index) => this.showStep(index, step, Boolean(answer.starts) && index === steps.length - 1));
    this.waiting.hidden = Boolean(answer.text || answer.thought || answer.reason);
    this.showThought();
    this.showNote();
    this.showReceipt();
  }

  /** The thought of a reasoning model, folded. */
  showThought() {
    const { thought, text, reason, usage } = this.answer;
    this.thought.hidden = !thought;
    if (!thought) return;
    const tokens = usage?.completion_tokens_details?.reasoning_tokens;
    this.thoughtTitle.textContent = text || reason ? `Thought${tokens ? `, ${count(tokens, "token")}` : ""}` : "Thinking …";
    this.thoughtText.textContent = thought;
  }

  showHead() {
    const { answer } = this;
    const title = this.transcript.heading(answer, this.turn);
    this.title.textContent = title;
    this.title.title = steeringOf(answer) ? `Vector ${steeringOf(answer).vector}, strength ${brief(steeringOf(answer).strength)}` : "The stock model";
    this.element.setAttribute("aria-label", `Answer, ${title}`);
    const { temperature, top_p, seed } = answer.asked ?? {};
    const { model } = this.transcript;
    const other = model && answer.model && identity(answer.model) !== identity(model);
    const told = temperature ? [`temperature ${temperature}`, ...(top_p < 1 ? [`top p ${top_p}`] : []), ...(seed === undefined ? [] : [`seed ${seed}`])] : [];
    this.sampling.textContent = [...(other ? [`another model: ${answer.model.id}`] : []), ...told].join(", ");
  }

  /** Show one step: its blocks, of which those that did not change stay. */
  showStep(index, step, ends) {
    const item = this.steps.children[index] ?? this.steps.appendChild(Object.assign(make("li"), { sources: [] }));
    const made = this.transcript.plain ? [{ source: step, make: () => make("p", { textContent: step }) }] : blocks(step, ends);
    let same = 0;
    while (same < made.length && item.sources[same] === made[same].source) same += 1;
    while (item.children.length > same) item.lastChild.remove();
    item.append(...made.slice(same).map((block) => block.make()));
    item.sources = made.map((block) => block.source);
  }

  /** Under a steered answer: what changed, beside the unsteered one. */
  showChange() {
    const { answer, turn } = this;
    const stock = turn.answers.find((one) => !steeringOf(one) && circumstances(one) === circumstances(answer));
    const found = steeringOf(answer) && stock ? changed(answer, stock) : null;
    this.headline.hidden = this.detail.hidden = !found;
    if (!found) return;
    const parts = found.headline.map((part, index) => make("span", { textContent: index < found.headline.length - 1 ? `${part}, ` : part }));
    this.headline.replaceChildren(...parts);
    this.detail.textContent = found.detail;
    this.headline.classList.toggle("other", found.same === false);
  }

  showNote() {
    const { answer } = this;
    const ends = { length: "Cut off at the length limit.", stopped: "Stopped." };
    const braked = (answer.brakes ?? []).map(
      (one) => `Began to repeat itself: ${count(one.dropped, "token")} cut off, strength lowered to ${brief(one.strength_after)}.`,
    );
    const told = [answer.steering?.warning, ...braked, ends[answer.reason], answer.error].filter(Boolean);
    this.note.hidden = !told.length;
    this.note.classList.toggle("warn", Boolean(answer.error || answer.steering?.warning));
    this.note.textContent = told.map((one) => one[0].toUpperCase() + one.slice(1)).join(" ");
  }

  showReceipt() {
    const rows = figures(this.answer);
    this.receipt.hidden = !rows.length;
    this.help.hidden = !rows.length;
    this.receipt.replaceChildren(...rows.map(([name, value, title]) =>
      make("div", { title }, make("dt", { textContent: name }), make("dd", { textContent: value }))));
  }
}

/** What the figures mean; the page's help has the same words. */
export const MEANING = {
  Tokens: "Pieces of text that the model wrote: about three quarters of a word each.",
  Steps: "Parts of the answer between blank lines. Code and bulleted lists are kept whole. The paper counts every blank line: where that differs, its number is in parentheses.",
  Density: "Tokens per step: how much each step carries. Steering towards dense raises it.",
  Speed: "Tokens per second while the answer was written; answers that are written at once share the machine.",
  "First token": "Time from the question to the first token, waiting included.",
};

/** The figures of a complete answer: name, value, meaning. */
function figures(answer) {
  const { usage } = answer;
  const details = usage?.completion_tokens_details;
  if (!details) return [];
  const { whole, literal } = stepsOf(answer);
  const per = (steps) => (steps ? brief(usage.completion_tokens / steps) : "-");
  const beside = (value) => (whole === literal ? "" : ` (${value})`);
  const found = {
    Tokens: usage.completion_tokens,
    Steps: `${whole}${beside(literal)}`,
    Density: `${per(whole)}${beside(per(literal))}`,
    Speed: details.tokens_per_second === null ? "-" : `${brief(details.tokens_per_second)}/s`,
    "First token": `${brief(details.time_to_first_token)} s`,
  };
  return Object.entries(found).map(([name, value]) => [name, value, MEANING[name]]);
}

/** A text in its steps, as the server found them; one piece until then. Their places count characters, not UTF-16 units. */
function cut(text, starts) {
  if (!text.trim()) return [];
  if (!starts?.length) return [text.trim()];
  const characters = [...text];
  return starts.map((start, index) => characters.slice(start, starts[index + 1]).join("").replace(/^\s*\n/, "").trimEnd());
}

/** A line for each answer; on narrow screens, where one card is seen at a time, already of two. */
function showOverview(table, turn, transcript) {
  if (!table) return;
  const done = turn.answers.filter((one) => one.usage);
  table.parentElement.hidden = turn.answers.length < 2 || done.length < 2;
  table.parentElement.classList.toggle("pair", turn.answers.length === 2);
  if (table.parentElement.hidden) return;
  const most = Math.max(...done.map((one) => one.usage.completion_tokens));
  const states = turn.answers.some((one) => one.stated);
  const row = (answer) => {
    const open = make("button", { type: "button", className: "quiet", textContent: transcript.heading(answer, turn), onclick: () => transcript.reveal(answer) });
    const tokens = answer.usage?.completion_tokens;
    const bar = make("span", { className: "bar-of" });
    bar.style.setProperty("--share", tokens ? tokens / most : 0);
    const cells = [stepsOf(answer)?.whole ?? "-", tokens ?? "-"].map((text) => make("td", { textContent: text }));
    cells[1].append(bar);
    return make("tr", {}, make("th", { scope: "row" }, open), ...cells, ...(states ? [make("td", { textContent: answer.stated ?? "-" })] : []));
  };
  const head = ["", "Steps", "Tokens", ...(states ? ["Answer"] : [])].map((text) => make(text ? "th" : "td", text ? { textContent: text, scope: "col" } : {}));
  table.replaceChildren(make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...turn.answers.map(row)));
}
