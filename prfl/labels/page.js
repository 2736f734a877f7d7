"use strict";
// The first half is what is answered and what is saved, without a document: tests run it in node.

const CHOICES = ["a", "b", "tie"];
const KEYS = { a: "a", arrowleft: "a", b: "b", arrowright: "b", t: "tie", arrowdown: "tie" };

// Answers: {"videos/x.mp4 videos/y.mp4": {dimension: "a" | "b" | "tie"}}.
function nameOf(pair) {
  return pair.a + " " + pair.b;
}

function answered(answers, pair, dimensions) {
  const given = answers[nameOf(pair)] || {};
  return dimensions.every((dimension) => dimension in given);
}

function firstOpen(answers, pair, dimensions) {
  const given = answers[nameOf(pair)] || {};
  const open = dimensions.findIndex((dimension) => !(dimension in given));
  return open < 0 ? 0 : open;
}

// The next pair after `from` that lacks an answer, from the start again at the end; -1 when there is none.
function nextOpen(answers, pairs, dimensions, from) {
  for (let step = 1; step <= pairs.length; step++) {
    const index = (from + step) % pairs.length;
    if (!answered(answers, pairs[index], dimensions)) return index;
  }
  return -1;
}

function withAnswer(answers, pair, dimension, choice) {
  const name = nameOf(pair);
  return { ...answers, [name]: { ...answers[name], [dimension]: choice } };
}

// What an earlier visit left, as far as it is about these pairs and questions.
function restored(text, pairs, dimensions) {
  let stored = {};
  try {
    stored = JSON.parse(text) || {};
  } catch (error) {
    return {};
  }
  let answers = {};
  for (const pair of pairs) {
    for (const dimension of dimensions) {
      const choice = (stored[nameOf(pair)] || {})[dimension];
      if (CHOICES.includes(choice)) answers = withAnswer(answers, pair, dimension, choice);
    }
  }
  return answers;
}

// One line a pair that has any answer: rows of the pair manifest that prfl reads.
function manifest(answers, pairs) {
  const given = pairs.filter((pair) => Object.keys(answers[nameOf(pair)] || {}).length > 0);
  return given.map((pair) => JSON.stringify({ ...pair, preference: answers[nameOf(pair)] }) + "\n").join("");
}

// ------------------------------------------------------------------------------------------------------- the page

function start() {
  const { id, dimensions, pairs, videos } = JSON.parse(document.getElementById("content").textContent);
  const find = (name) => document.getElementById(name);
  const store = "prfl-labels/" + id;
  let answers = {};
  let keeps = true;
  try {
    answers = restored(localStorage.getItem(store), pairs, dimensions);
  } catch (error) {
    keeps = false; // some browsers refuse storage to a local file
  }
  let unsaved = false;
  let visited = []; // indices, for Back
  let index = Math.max(0, nextOpen(answers, pairs, dimensions, pairs.length - 1));
  let question = firstOpen(answers, pairs[index], dimensions);

  function keep() {
    unsaved = true;
    try {
      localStorage.setItem(store, JSON.stringify(answers));
    } catch (error) {
      keeps = false;
    }
  }

  function show() {
    const pair = pairs[index];
    find("prompt").textContent = pair.prompt;
    for (const side of ["a", "b"]) {
      const video = find(side);
      if (video.dataset.file !== pair[side]) {
        video.dataset.file = pair[side];
        video.src = "data:video/mp4;base64," + videos[pair[side]];
      }
    }
    replay();
    progress();
  }

  function progress() {
    const given = answers[nameOf(pairs[index])] || {};
    for (const row of find("questions").children) {
      row.classList.toggle("now", row.dataset.dimension === dimensions[question]);
      for (const button of row.querySelectorAll("button")) {
        button.classList.toggle("chosen", given[row.dataset.dimension] === button.dataset.choice);
      }
    }
    const count = pairs.filter((pair) => answered(answers, pair, dimensions)).length;
    find("done").style.width = (100 * count) / pairs.length + "%";
    find("count").textContent =
      `${count} of ${pairs.length} pairs answered; this is pair ${index + 1}.` +
      (count === pairs.length ? " All done: save, and thank you." : "");
    find("kept").textContent = keeps
      ? "Answers are kept in this browser."
      : "This browser does not keep answers: save before you leave.";
    find("kept").classList.toggle("lost", !keeps);
  }

  function go(to) {
    index = to;
    question = firstOpen(answers, pairs[index], dimensions);
    show();
  }

  function choose(dimension, choice) {
    answers = withAnswer(answers, pairs[index], dimension, choice);
    keep();
    find("saved").textContent = "";
    if (answered(answers, pairs[index], dimensions) && dimension === dimensions[dimensions.length - 1]) {
      const next = nextOpen(answers, pairs, dimensions, index);
      if (next >= 0) {
        visited.push(index);
        return go(next);
      }
    }
    question = Math.min(dimensions.indexOf(dimension) + 1, dimensions.length - 1);
    progress();
  }

  function skip() {
    const next = nextOpen(answers, pairs, dimensions, index);
    visited.push(index);
    go(next >= 0 ? next : (index + 1) % pairs.length);
  }

  function back() {
    if (visited.length > 0) go(visited.pop());
    else if (index > 0) go(index - 1);
    question = 0; // to answer the pair anew
    progress();
  }

  function replay() {
    for (const side of ["a", "b"]) {
      find(side).currentTime = 0;
      find(side).play().catch(() => {}); // a new source interrupts the one before
    }
  }

  function save() {
    const text = manifest(answers, pairs);
    const note = find("saved");
    note.classList.toggle("lost", text === "");
    if (text === "") {
      note.textContent = "Nothing is answered yet.";
      return;
    }
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: "application/jsonl" }));
    link.download = "preferences.jsonl";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
    unsaved = false;
    note.textContent = `preferences.jsonl: ${text.split("\n").length - 1} pairs. Put it beside manifest.jsonl.`;
  }

  for (const dimension of dimensions) {
    const row = document.createElement("div");
    row.className = "question";
    row.dataset.dimension = dimension;
    const label = row.appendChild(document.createElement("span"));
    label.textContent = dimension;
    for (const choice of ["a", "tie", "b"]) {
      const button = row.appendChild(document.createElement("button"));
      button.dataset.choice = choice;
      button.textContent = choice;
      button.onclick = () => {
        button.blur(); // or the next space would press it again
        choose(dimension, choice);
      };
    }
    find("questions").appendChild(row);
  }
  Object.entries({ back, skip, replay, save }).forEach(([name, action]) => {
    find(name).onclick = () => {
      find(name).blur();
      action();
    };
  });
  addEventListener("keydown", (event) => {
    const key = event.key.toLowerCase();
    const control = event.ctrlKey || event.metaKey;
    let action = null;
    if (control && key === "s") action = save;
    else if (control || event.altKey || event.repeat) return;
    else if (key in KEYS) action = () => choose(dimensions[question], KEYS[key]);
    else action = { backspace: back, s: skip, r: replay }[key];
    if (!action) return;
    event.preventDefault();
    action();
  });
  addEventListener("beforeunload", (event) => {
    if (unsaved && !keeps) event.preventDefault(); // the browser asks whether to leave
  });
  show();
}

if (typeof document !== "undefined") start();
if (typeof module !== "undefined") module.exports = { KEYS, answered, firstOpen, manifest, nextOpen, restored, withAnswer };
