// Opens pages in headless Chromium for the other files here, and keeps what their console says. CHROMIUM names the browser.

import puppeteer from "puppeteer-core";

/** A browser with one page of a usual screen, and what its console has said so far. */
export async function open() {
  const browser = await puppeteer.launch({
    executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
    // Inside a container Chromium's own sandbox has no user to be.
    args: process.getuid() === 0 ? ["--no-sandbox"] : [],
  });
  const page = await browser.newPage();
  const said = [];
  page.on("console", (message) => said.push(message.text()));
  page.on("pageerror", (error) => said.push(String(error)));
  await page.setViewport({ width: 1280, height: 900 });
  return { browser, page, said };
}
