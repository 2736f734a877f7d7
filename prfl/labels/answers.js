"use strict";
// What is answered, and what is saved of it, without a document: tests run it in node.
// rows: by the pair's name, the row of a manifest that a pair and its answers make.

const KEYS = {
  a: "a", arrowleft: "a", 1: "a",
  b: "b", arrowright: "b", 2: "b",
  t: "tie", arrowdown: "tie", 3: "tie",
  x: "bad", 4: "bad",
};
const CHOICES = ["a", "tie", "bad", "b"]; // as they stand on the page

function nameOf(pair) {
  return pair.a + " " + pair.b;
}

function choiceOf(rows, pair, dimension) {
  const row = rows[nameOf(pair)];
  if (!row || !Object.hasOwn(row.preference, dimension)) return null;
  return (row.both_bad || []).includes(dimension) ? "bad" : row.preference[dimension];
}

// The rows with another choice; null takes the answer back.  Two bad videos are a tie of which more is known.
function withChoice(rows, pair, dimension, choice) {
  const before = rows[nameOf(pair)] || { preference: {} };
  const preference = { ...before.preference };
  delete preference[dimension];
  const bad = (before.both_bad || []).filter((name) => name !== dimension);
  if (choice !== null) preference[dimension] = choice === "bad" ? "tie" : choice;
  if (choice === "bad") bad.push(dimension);
  const row = { ...pair, preference };
  if (bad.length > 0) row.both_bad = bad;
  return { ...rows, [nameOf(pair)]: row };
}

function isAnswered(rows, pair, dimensions) {
  return dimensions.every((dimension) => choiceOf(rows, pair, dimension) !== null);
}

// The first question of a pair without an answer; -1 when all have one.
function firstOpen(rows, pair, dimensions) {
  return dimensions.findIndex((dimension) => choiceOf(rows, pair, dimension) === null);
}

// The next pair after `from` that lacks an answer, from the start again at the end; -1 when there is none.
function nextOpen(rows, pairs, dimensions, from) {
  for (let step = 1; step <= pairs.length; step++) {
    const index = (from + step) % pairs.length;
    if (!isAnswered(rows, pairs[index], dimensions)) return index;
  }
  return -1;
}

// The rows of a list that are rows, by name.  What a pair of this page is and to which split it belongs, the page says.
function rowsOf(list, pairs) {
  const here = new Map(pairs.map((pair) => [nameOf(pair), pair]));
  const rows = {};
  for (const row of Array.isArray(list) ? list : []) {
    if (!row || typeof row.preference !== "object" || row.preference === null) continue;
    const { rater, ...rest } = row;
    rows[nameOf(row)] = { ...rest, ...here.get(nameOf(row)) };
  }
  return rows;
}

// What an earlier visit left in the browser; nothing where that cannot be read.
function restored(text, pairs) {
  try {
    return rowsOf(JSON.parse(text), pairs);
  } catch (error) {
    return {};
  }
}

// A row as it is saved, with who answered.
function signed(row, rater) {
  return rater === "" ? row : { ...row, rater };
}

// One line a pair that has any answer, in the page's order, then those of an earlier page of this folder.
function manifest(rows, pairs, rater) {
  const order = new Set([...pairs.map(nameOf), ...Object.keys(rows)]);
  const given = [...order].map((name) => rows[name]).filter((row) => row && Object.keys(row.preference).length > 0);
  return given.map((row) => JSON.stringify(signed(row, rater)) + "\n").join("");
}

// A name that any disk takes, for the file of one rater.
function fileName(rater) {
  const word = rater.toLowerCase().normalize("NFKD").replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-+|-+$/g, "");
  return word === "" ? "preferences.jsonl" : `preferences-${word.slice(0, 40)}.jsonl`;
}

if (typeof module !== "undefined") {
  module.exports = {
    CHOICES, KEYS, choiceOf, fileName, firstOpen, isAnswered, manifest, nextOpen, restored, rowsOf, withChoice,
  };
}
