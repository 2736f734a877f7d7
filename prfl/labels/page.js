// The page: which pair and which question, by mouse and keys.

// Of each choice: the word on its button, what a telephone has no room for, and the key.
const WORDS = {
  a: ["A", " is better", "A"],
  tie: ["No difference", "", "T"],
  bad: ["Both bad", "", "X"],
  b: ["B", " is better", "B"],
};
const GRACE = 350; // ms after a new pair came in which the second click of a double click is no answer to it

function start() {
  const content = JSON.parse(document.getElementById("content").textContent);
  const { questions, pairs, videos, server } = content;
  const dimensions = Object.keys(questions);
  const find = (name) => document.getElementById(name);
  const shown = player([find("a"), find("b")], videos, find, server);
  const kept = new Keeping(content, (text, kind) => {
    find("state").textContent = text;
    find("state").className = kind;
  });

  let changes = []; // {index, dimension, before}, for undo
  let visited = []; // indices, for Back
  let index = 0;
  let question = 0; // that keys answer; -1 for none
  let came = 0; // when the pair on the screen came

  // Who answers; then the first pair without an answer.
  async function begin(name) {
    try {
      await kept.begin(name.trim().replace(/\s+/g, " "));
    } catch (error) {
      ask();
      const reason = error instanceof TypeError ? "the server does not answer" : error.message;
      find("why").textContent = `This did not work: ${reason}.`;
      return;
    }
    changes = [];
    visited = [];
    find("begin").hidden = true;
    for (const part of ["work", "told"]) find(part).hidden = false;
    find("save").hidden = server;
    find("who").textContent = kept.rater === "" ? "" : `You are ${kept.rater}.`;
    go(Math.max(0, nextOpen(kept.rows, pairs, dimensions, pairs.length - 1)));
  }

  function ask() {
    shown.stop();
    for (const part of ["work", "told", "save"]) find(part).hidden = true;
    find("state").textContent = "";
    find("begin").hidden = false;
    find("name").value = kept.rater;
    find("name").required = server;
    find("name").focus();
  }

  function go(to) {
    index = to;
    came = performance.now();
    question = Math.max(0, firstOpen(kept.rows, pairs[index], dimensions));
    find("prompt").textContent = pairs[index].prompt;
    find("prompt").scrollTop = 0;
    shown.load(pairs[index]);
    scrollTo(0, 0);
    show();
  }

  function show() {
    for (const row of find("questions").children) {
      const { dimension } = row.dataset;
      row.classList.toggle("now", dimension === dimensions[question]);
      for (const button of row.querySelectorAll("button")) {
        const chosen = choiceOf(kept.rows, pairs[index], dimension) === button.dataset.choice;
        button.setAttribute("aria-pressed", chosen);
      }
    }
    const count = pairs.filter((pair) => isAnswered(kept.rows, pair, dimensions)).length;
    find("done").style.width = (100 * count) / pairs.length + "%";
    find("bar").setAttribute("aria-valuemax", pairs.length);
    find("bar").setAttribute("aria-valuenow", count);
    find("count").textContent = `${count} of ${pairs.length} pairs answered; this is pair ${index + 1}.`;
    find("undo").disabled = changes.length === 0;
    find("back").disabled = visited.length === 0 && index === 0;
    find("finished").hidden = count < pairs.length;
    find("finished").textContent = server
      ? "All pairs are answered. Thank you: you may close this page when every answer is saved."
      : "All pairs are answered. Save the file, and thank you.";
  }

  // The next pair comes when this answer completes the pair, whichever question it is of.
  function choose(dimension, choice) {
    const pair = pairs[index];
    const complete = isAnswered(kept.rows, pair, dimensions);
    changes.push({ index, dimension, before: choiceOf(kept.rows, pair, dimension) });
    kept.put(pair, dimension, choice);
    const open = firstOpen(kept.rows, pair, dimensions);
    const to = open < 0 && !complete ? nextOpen(kept.rows, pairs, dimensions, index) : -1;
    if (to >= 0) {
      visited.push(index);
      return go(to);
    }
    const last = open < 0 && !complete; // of all pairs: one key too many changes nothing
    question = open >= 0 ? open : last ? -1 : Math.min(dimensions.indexOf(dimension) + 1, dimensions.length - 1);
    show();
  }

  function undo() {
    const change = changes.pop();
    if (!change) return;
    kept.put(pairs[change.index], change.dimension, change.before);
    if (change.index !== index) {
      if (visited[visited.length - 1] === change.index) visited.pop();
      go(change.index);
    }
    question = dimensions.indexOf(change.dimension);
    show();
  }

  function next() {
    const open = nextOpen(kept.rows, pairs, dimensions, index);
    visited.push(index);
    go(open >= 0 ? open : (index + 1) % pairs.length);
  }

  function back() {
    if (visited.length > 0) go(visited.pop());
    else if (index > 0) go(index - 1);
  }

  // A row of buttons for each question.
  for (const dimension of dimensions) {
    const row = document.createElement("div");
    row.className = "question";
    row.dataset.dimension = dimension;
    row.setAttribute("role", "group");
    row.setAttribute("aria-label", questions[dimension]);
    row.appendChild(document.createElement("span")).textContent = questions[dimension];
    const choices = row.appendChild(document.createElement("div"));
    for (const choice of CHOICES) {
      const button = choices.appendChild(document.createElement("button"));
      button.dataset.choice = choice;
      const [word, rest, letter] = WORDS[choice];
      button.textContent = word;
      button.setAttribute("aria-label", word + rest);
      button.appendChild(document.createElement("span")).textContent = rest + " ";
      button.appendChild(document.createElement("kbd")).textContent = letter;
      button.onclick = () => {
        button.blur(); // or the next space would press it again
        if (performance.now() - came > GRACE) choose(dimension, choice);
      };
    }
    find("questions").appendChild(row);
  }

  const { pause, replay, slower, step } = shown;
  const save = () => kept.save();
  const steps = { earlier: () => step(-1), later: () => step(1) };
  Object.entries({ back, undo, next, save, pause, replay, ...steps, speed: slower, change: ask }).forEach(
    ([name, action]) => {
      find(name).onclick = () => {
        find(name).blur();
        action();
      };
    },
  );
  find("person").onsubmit = (event) => {
    event.preventDefault();
    begin(find("name").value);
  };

  const others = { backspace: back, enter: next, n: next, r: replay, " ": pause, v: slower };
  addEventListener("keydown", (event) => {
    if (find("work").hidden) return;
    const pressed = event.key.toLowerCase();
    const control = event.ctrlKey || event.metaKey;
    const onButton = event.target instanceof HTMLButtonElement || event.target.tagName === "SUMMARY";
    let action = null;
    if (control && pressed === "s") action = save;
    else if (control && pressed === "z") action = undo;
    else if (control || event.altKey || event.target === find("at")) return;
    else if (pressed === ",") action = steps.earlier;
    else if (pressed === ".") action = steps.later;
    else if (event.repeat) return;
    else if (onButton && (pressed === " " || pressed === "enter")) return; // which Tab led to
    else if (pressed in KEYS) action = () => question >= 0 && choose(dimensions[question], KEYS[pressed]);
    else action = others[pressed];
    if (!action) return;
    event.preventDefault();
    action();
  });
  addEventListener("beforeunload", (event) => {
    if (kept.loses) event.preventDefault(); // the browser asks whether to leave
  });

  find("task").textContent =
    `${pairs.length} pairs of videos are shown, two beside each other. ` +
    (dimensions.length > 1 ? "For each pair, answer:" : "For each pair, answer this question:");
  for (const text of Object.values(questions)) {
    find("list").appendChild(document.createElement("li")).textContent = text;
  }
  find("why").textContent =
    "It stands beside your answers, so that those of several people can be told apart. " +
    (server ? "The same name goes on later where it stopped." : "If you are the only one, leave it empty.");
  find("where").textContent = server
    ? "Every answer is sent to the computer that this page came from, and to nobody else."
    : "Nothing leaves this page. Save file writes your answers: " +
      (videos[pairs[0].a].src.startsWith("data:")
        ? "send that file back to whoever sent you this page."
        : "put that file beside the videos, in this page's folder.");
  const known = kept.stored("rater");
  if (known === null) ask();
  else begin(known);
}

start();
