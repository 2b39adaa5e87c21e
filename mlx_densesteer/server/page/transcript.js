/** Turns and answers on the page. Text of the model is text: it never becomes markup. */

import { describe } from "/page/exporting.js";
import { brief, count, splitSteps } from "/page/steps.js";

/** @returns {HTMLElement} */
export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

/**
 * Show a turn, and return the views of its answers.
 * @param {HTMLElement} list @param {object} turn @param {(index: number) => void} choose
 */
export function showTurn(list, turn, choose) {
  const answers = make("div", { className: "answers" });
  list.append(make("li", {}, make("p", { className: "asked", textContent: turn.question }), answers));
  const views = turn.answers.map((answer, index) => {
    const view = new AnswerView(answer, turn.answers.length > 1, () => choose(index));
    answers.append(view.element);
    return view;
  });
  views.forEach((view, index) => view.setChosen(index === turn.chosen));
  return views;
}

/** One answer: its steps as they come, and its receipt. */
class AnswerView {
  constructor(answer, comparing, choose) {
    this.answer = answer;
    this.comparing = comparing;
    this.title = make("h3");
    this.steps = make("ol", { className: "steps" });
    this.note = make("p", { className: "note", hidden: true });
    this.receipt = make("dl", { className: "receipt" });
    this.button = make("button", { type: "button", hidden: !comparing, onclick: choose });
    this.element = make("article", { className: "answer" }, this.title, this.steps, this.note, this.receipt,
      make("div", { className: "row" }, this.button));
    this.update();
  }

  setChosen(chosen) {
    this.element.classList.toggle("chosen", chosen);
    this.button.textContent = chosen ? "The conversation goes on with this one" : "Go on with this one";
    this.button.disabled = chosen;
  }

  /** Show what there is of the answer; only the last step changes while it streams. */
  update() {
    const { answer } = this;
    const title = answer.steering === undefined ? answer.label : describe(answer.steering);
    this.title.textContent = title;
    this.element.setAttribute("aria-label", `Answer, ${title}`);
    const steps = splitSteps(answer.text);
    while (this.steps.children.length > steps.length) this.steps.lastChild.remove();
    steps.forEach((step, index) => {
      const item = this.steps.children[index] ?? this.steps.appendChild(make("li"));
      if (item.textContent !== step) item.textContent = step;
    });
    this.showNote();
    this.showReceipt(steps.length);
  }

  showNote() {
    const { answer } = this;
    const ends = { length: "Cut off at the length limit.", stopped: "Stopped." };
    const told = [answer.steering?.warning, ends[answer.reason], answer.error].filter(Boolean);
    this.note.hidden = !told.length;
    this.note.classList.toggle("warn", Boolean(answer.error || answer.steering?.warning));
    this.note.textContent = told.join(" ");
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
