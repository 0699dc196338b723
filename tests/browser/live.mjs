// Reads a page of `sail-train report --serve` while its run goes on, in headless Chromium.
//
//     node tests/browser/live.mjs PROGRAM RUN_DIR
//
// RUN_DIR is one run and gets a step more. The page shows it by itself, keeps zoom, lines and words that were asked for, and
// says so when nobody answers any more. CHROMIUM names the browser.

import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { once } from "node:events";
import { appendFileSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { open } from "./browser.mjs";

const [program, run] = process.argv.slice(2);
if (!run) {
  console.error("usage: node tests/browser/live.mjs PROGRAM RUN_DIR");
  process.exit(2);
}
const server = spawn(program, ["report", run, "--serve=0"], { stdio: ["ignore", "pipe", "inherit"] });
const address = String((await once(server.stdout, "data"))[0]).trim();
const { browser, page, said } = await open();

try {
  await page.goto(address);
  const steps = () => page.$eval("table.timeline th .quiet", (element) => Number.parseInt(element.textContent, 10));
  const before = await steps();

  // Chosen by the reader.
  const lines = () => page.$$eval("#figure-held-out-loss polyline", (all) => all.length);
  const all = await lines();
  await page.$eval("figure:has(#figure-held-out-loss) .legend button", (button) => button.click());
  await page.$eval("#figure-training-loss", (picture) => picture.focus());
  for (const key of ["ArrowRight", "ArrowRight", "+"]) await page.keyboard.press(key);
  await page.$eval("#gallery-text", (input) => { input.value = "no text has these words"; input.dispatchEvent(new Event("input")); });

  const metrics = join(run, "metrics.jsonl");
  const train = readFileSync(metrics, "utf8").split("\n").filter((line) => line.includes('"kind":"train"')).at(-1);
  const goesOn = async (step) => {
    appendFileSync(metrics, `${JSON.stringify({ ...JSON.parse(train), step })}\n`);
    const isShown = (wanted) => Number.parseInt(document.querySelector("table.timeline th .quiet").textContent, 10) >= wanted;
    await page.waitForFunction(isShown, { timeout: 30_000 }, step);
  };
  await goesOn(before + 1);

  assert.equal(await steps(), before + 1);
  assert.equal(await lines(), all - 1, "a line that was switched off came back");
  assert(!(await page.$eval("figure:has(#figure-training-loss) .top button", (button) => button.hidden)), "the zoom is gone");
  assert.equal(await page.evaluate(() => document.activeElement.id), "figure-training-loss");
  assert.equal(await page.$$eval(".card", (cards) => cards.length), 0, "the words that were asked for are forgotten");
  // Also while a choice has the focus.
  await page.focus("#gallery-when");
  await goesOn(before + 2);
  assert.equal(await page.evaluate(() => document.activeElement.id), "gallery-when");
  assert.deepEqual(said, []);

  server.kill();
  await page.waitForFunction(() => document.getElementById("made").textContent.startsWith("No newer figures"), { timeout: 30_000 });
  console.log(`${address}: followed its run`);
} finally {
  server.kill();
  await browser.close();
}
