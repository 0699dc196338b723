// Reads a page of `sail-train report` as a person does, in headless Chromium.
//
//     node tests/browser/report.mjs runs/tiny/report.html [SCREENSHOT.png]
//
// The pointer and the keyboard read and zoom a curve, the theme changes, answers are filtered; nothing is fetched, the
// console stays empty, a phone is wide enough, and axe-core finds nothing serious in either theme. CHROMIUM names the browser.

import assert from "node:assert/strict";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";
import { open } from "./browser.mjs";

const [file, screenshot] = process.argv.slice(2);
if (!file) {
  console.error("usage: node tests/browser/report.mjs REPORT.html [SCREENSHOT.png]");
  process.exit(2);
}
const address = pathToFileURL(file).href;
const { browser, page, said } = await open();

try {
  page.on("request", (request) => {
    const url = request.url();
    if (url !== address && !url.startsWith("data:")) said.push(`fetched ${url}`);
  });
  await page.goto(address);

  const titles = await page.$$eval("h2", (all) => all.map((title) => title.textContent));
  for (const wanted of ["Stages", "Losses", "Answers", "What was trained", "Lineage", "Configuration"]) {
    assert(titles.includes(wanted), `no section ${wanted} in ${titles}`);
  }
  await curves(page);
  await gallery(page);
  await themes(page);
  if (screenshot) await page.screenshot({ path: screenshot });

  await page.setViewport({ width: 390, height: 844, hasTouch: true });
  const [wide, room] = await page.evaluate(() => [document.documentElement.scrollWidth, document.documentElement.clientWidth]);
  assert(wide <= room, `${wide} pixels are wider than a phone's ${room}`);
  assert.deepEqual(said, []);
  console.log(`${file}: read, zoomed, filtered, in both themes and on a phone`);
} finally {
  await browser.close();
}

async function curves(page) {
  const chart = await page.$("figure");
  const [picture, readout] = [await chart.$("svg"), await chart.$("output")];
  const text = () => readout.evaluate((element) => element.textContent);
  const isWhole = async () => (await chart.$eval(".top button", (button) => button.hidden));
  await picture.scrollIntoView();
  const box = await picture.boundingBox();
  const at = (part) => [box.x + box.width * part, box.y + box.height / 2];
  await page.mouse.move(...at(0.5));
  assert.match(await text(), /^step \d[\d,]*: .*\d/);
  await page.mouse.down();
  await page.mouse.move(...at(0.9));
  await page.mouse.up();
  assert(!(await isWhole()), "dragging did not zoom");
  await page.mouse.move(0, 0);
  await picture.evaluate((element) => element.focus());
  await page.keyboard.press("Escape");
  assert(await isWhole(), "Escape did not show all");
  await page.keyboard.press("ArrowRight");
  const first = await text();
  await page.keyboard.press("ArrowRight");
  assert.match(first, /^step \d/);
  assert.notEqual(await text(), first);
  await page.keyboard.press("+");
  assert(!(await isWhole()), "+ did not zoom");
  await page.keyboard.press("Escape");
  const lines = () => picture.$$eval("polyline", (all) => all.length);
  const before = await lines();
  await chart.$eval(".legend button", (button) => button.click());
  assert.equal(await lines(), before - 1);
  await chart.$eval(".legend button", (button) => button.click());
  assert.equal(await lines(), before);
}

async function gallery(page) {
  const shown = () => page.$$eval(".card", (cards) => cards.length);
  const all = await shown();
  assert(all > 0, "no answers");
  assert.equal(await page.$$eval(".card img", (images) => images.filter((image) => image.naturalWidth === 0).length), 0, "a picture is broken");
  await page.type("#gallery-text", "no text has these words");
  assert.equal(await shown(), 0);
  await page.$eval("#gallery-text", (input) => { input.value = ""; input.dispatchEvent(new Event("input")); });
  assert.equal(await shown(), all);
  const source = await page.$eval("#gallery-source option:last-child", (option) => option.value);
  await page.select("#gallery-source", source);
  const samples = await page.$$eval(".card .quiet", (names) => names.map((name) => name.textContent));
  assert(samples.length > 0 && samples.every((sample) => sample.startsWith(`${source}/`)), String(samples));
  await page.select("#gallery-source", "");
}

async function themes(page) {
  const axe = createRequire(import.meta.url).resolve("axe-core/axe.min.js");
  await page.addScriptTag({ path: axe });
  const colour = () => page.evaluate(() => getComputedStyle(document.body).backgroundColor);
  const seen = new Set();
  for (const theme of ["light", "dark"]) {
    await page.click("#theme");
    assert.equal(await page.$eval("html", (html) => html.dataset.theme), theme);
    seen.add(await colour());
    const { violations } = await page.evaluate(() => window.axe.run());
    const serious = violations.filter(({ impact }) => ["serious", "critical"].includes(impact));
    assert.deepEqual(serious.map(({ id, nodes }) => `${id}: ${nodes[0].html}`), [], `axe-core, ${theme}`);
  }
  assert.equal(seen.size, 2, "the themes look alike");
  await page.click("#theme");
}
