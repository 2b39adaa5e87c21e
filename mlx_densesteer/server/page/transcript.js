/** Turns and answers on the page, and the scrolling through them. */

import { element, make } from "/page/dom.js";
import { dress } from "/page/markup.js";
import { brief, count, describe, splitSteps } from "/page/steps.js";

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
    this.toEnd();
  }

  /** Show a new turn at the end, or the new answers of a turn. */
  add(turn) {
    let place = this.places.get(turn);
    if (!place) {
      const asked = make("h2", { className: "asked" }, make("span", { className: "sr", textContent: "You asked: " }), turn.question);
      place = make("li", {}, asked, make("div", { className: "answers" }));
      this.places.set(turn, place);
      element("turns").append(place);
    }
    for (const answer of turn.answers) {
      if (this.views.has(answer)) continue;
      const view = new AnswerView(answer, this, () => {
        const index = turn.answers.indexOf(answer);
        if (turn === this.turns.at(-1)) this.actions.choose(turn, index);
        else this.actions.branch(turn, index);
      });
      this.views.set(answer, view);
      place.lastChild.append(view.element);
    }
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
    this.views.get(answer)?.update();
    this.follow();
  }

  /** Show which answers the conversation continues from, and the buttons of the others. */
  refresh() {
    element("empty").hidden = this.turns.length > 0;
    for (const turn of this.turns) {
      const last = turn === this.turns.at(-1);
      turn.answers.forEach((answer, index) => {
        this.views.get(answer)?.setPlace(turn.answers.length > 1 && index === turn.chosen, index === turn.chosen, last);
      });
    }
  }

  /** @param {boolean} plain show the text as the model wrote it */
  setPlain(plain) {
    this.plain = plain;
    this.views.forEach((view) => view.redraw());
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

/** One answer: its steps as they come, and its figures. */
class AnswerView {
  constructor(answer, transcript, goOn) {
    this.answer = answer;
    this.transcript = transcript;
    this.title = make("h3");
    this.steps = make("ol", { className: "steps" });
    this.waiting = make("p", { className: "waiting", textContent: "Waiting for the first token …", hidden: true });
    this.note = make("p", { className: "note", hidden: true });
    this.receipt = make("dl", { className: "receipt" });
    this.badge = make("span", { className: "badge", textContent: "✓ Continues from this one" });
    this.button = make("button", { type: "button", onclick: goOn });
    this.copy = make("button", { type: "button", className: "quiet", textContent: "Copy", onclick: () => this.copyText() });
    this.copy.hidden = !navigator.clipboard; // browsers have none without TLS, except on localhost
    this.element = make("article", { className: "answer" }, make("div", { className: "head" }, this.title, this.copy),
      this.steps, this.waiting, this.note, this.receipt, make("div", { className: "row" }, this.badge, this.button));
    this.update();
  }

  setPlace(marked, chosen, last) {
    this.element.classList.toggle("chosen", marked);
    this.badge.hidden = !marked;
    this.button.hidden = last ? chosen : !this.answer.text;
    this.button.textContent = last ? "Continue from this one" : "Branch from here";
  }

  async copyText() {
    await navigator.clipboard.writeText(this.answer.text);
    this.copy.textContent = "Copied";
    setTimeout(() => { this.copy.textContent = "Copy"; }, 1500);
  }

  redraw() {
    this.steps.replaceChildren();
    this.update();
  }

  /** Show the answer so far; only changed parts are rebuilt. */
  update() {
    const { answer } = this;
    const title = answer.steering === undefined ? answer.label : describe(answer.steering);
    this.title.textContent = title;
    this.element.setAttribute("aria-label", `Answer, ${title}`);
    const steps = splitSteps(answer.text);
    while (this.steps.children.length > steps.length) this.steps.lastChild.remove();
    let fenced = false;
    steps.forEach((step, index) => { fenced = this.showStep(index, step, fenced); });
    this.waiting.hidden = Boolean(answer.text || answer.reason);
    this.showNote();
    this.showReceipt(steps.length);
  }

  /** Show one step; return whether the next begins inside a code fence. */
  showStep(index, step, fenced) {
    const item = this.steps.children[index] ?? this.steps.appendChild(make("li"));
    if (item.step !== step || item.fencedBefore !== fenced) {
      const dressed = this.transcript.plain ? { nodes: [step], fenced: false } : dress(step, fenced);
      item.replaceChildren(...dressed.nodes);
      Object.assign(item, { step, fencedBefore: fenced, fencedAfter: dressed.fenced });
    }
    return item.fencedAfter;
  }

  showNote() {
    const { answer } = this;
    const ends = { length: "Cut off at the length limit.", stopped: "Stopped." };
    const told = [answer.steering?.warning, ends[answer.reason], answer.error].filter(Boolean);
    this.note.hidden = !told.length;
    this.note.classList.toggle("warn", Boolean(answer.error || answer.steering?.warning));
    this.note.textContent = told.map((one) => one[0].toUpperCase() + one.slice(1)).join(" ");
  }

  showReceipt(steps) {
    const { usage } = this.answer;
    const details = usage?.completion_tokens_details;
    const rows = details
      ? [
          ["tokens", usage.completion_tokens], ["steps", details.steps],
          ["density", details.density === null ? "-" : brief(details.density)],
          ["tokens/s", brief(details.tokens_per_second)], ["first after", `${brief(details.time_to_first_token)} s`],
        ]
      : steps ? [["so far", count(steps, "step")]] : [];
    this.receipt.replaceChildren(
      ...rows.map(([name, value]) => make("div", {}, make("dt", { textContent: name }), make("dd", { textContent: value }))),
    );
  }
}
