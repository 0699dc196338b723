// Opens a page about more points than a call of JavaScript takes as arguments, in headless Chromium.
//
//     node tests/browser/many.mjs runs/tiny/report.html
//
// The page is that of `sail-train report` with one of its runs, made as long as curves are, many times over. It draws every
// line, reads and zooms, and the console stays empty. CHROMIUM names the browser.

import assert from "node:assert/strict";
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { pathToFileURL } from "node:url";
import { open } from "./browser.mjs";

// 800 is what `curve.rs` has at most; with the range of the loss these are 192,000 numbers in one figure.
const RUNS = 80, POINTS = 800;

const [file] = process.argv.slice(2);
if (!file) {
  console.error("usage: node tests/browser/many.mjs REPORT.html");
  process.exit(2);
}
const folder = mkdtempSync(join(tmpdir(), "sail-many-"));
const { browser, page, said } = await open();

try {
  const many = join(folder, "report.html");
  writeFileSync(many, manyRuns(readFileSync(file, "utf8")));
  await page.goto(pathToFileURL(many).href);
  assert.deepEqual(said, []);

  for (const figure of ["training-loss", "held-out-loss", "learning-rate", "time-of-a-step"]) {
    const lines = await page.$$eval(`#figure-${figure} polyline`, (all) => all.length);
    assert(lines >= RUNS, `${figure} has ${lines} lines of ${RUNS} runs`);
  }
  const chart = await page.$("figure:has(#figure-training-loss)");
  await chart.$eval("svg", (picture) => picture.focus());
  for (const key of ["ArrowRight", "ArrowRight", "+"]) await page.keyboard.press(key);
  assert.match(await chart.$eval("output", (output) => output.textContent), /^step 2: /);
  assert(!(await chart.$eval(".top button", (button) => button.hidden)), "+ did not zoom");
  assert.deepEqual(said, []);
  console.log(`${file}: ${RUNS} runs of ${POINTS} points each on one page`);
} finally {
  await browser.close();
  rmSync(folder, { recursive: true });
}

/** The page with other data. */
function manyRuns(html) {
  const before = '<script type="application/json" id="data">', after = "</script>";
  const from = html.indexOf(before) + before.length, to = html.indexOf(after, from);
  const report = JSON.parse(html.slice(from, to));
  const stage = report.courses[0].stages.at(-1);
  stage.curve = { ...longer(stage.curve), step: Array.from({ length: POINTS }, (_, i) => i + 1) };
  stage.pictures = {};
  stage.evaluations.forEach((evaluation) => { evaluation.report.generations = []; });
  report.courses = Array.from({ length: RUNS }, (_, i) => ({ name: `run ${i}`, stages: [stage] }));
  return html.slice(0, from) + JSON.stringify(report).replaceAll("<", "\\u003c") + html.slice(to);
}

/** Lists of numbers, again and again until each has as many as a curve. */
function longer(numbers) {
  if (Array.isArray(numbers)) return Array.from({ length: POINTS }, (_, i) => numbers[i % numbers.length]);
  return Object.fromEntries(Object.entries(numbers).map(([name, inner]) => [name, longer(inner)]));
}
