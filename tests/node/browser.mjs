// Chromium driven by JSON lines: pages by name, in contexts ("devices") by name.
//
//   node browser.mjs <path of chromium>
import { chromium } from 'playwright-core'
import { serveCommands } from './stdio.mjs'

const FLAGS = [
  '--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run',
  '--disable-background-networking', '--disable-component-update', '--disable-sync', '--disable-dev-shm-usage',
]
const browser = await chromium.launch({ executablePath: process.argv[2], args: FLAGS, handleSIGTERM: true })
const contexts = new Map()
const pages = new Map()

async function contextOf(name) {
  if (!contexts.has(name)) contexts.set(name, await browser.newContext())
  return contexts.get(name)
}

function find(name = 'main') {
  const found = pages.get(name)
  if (!found) throw new Error(`unable to use page ${name}; open it first`)
  return found
}

/** An element by its data-testid, or by any CSS selector. */
function locate({ page, testId, selector }) {
  const { view } = find(page)
  return testId ? view.getByTestId(testId) : view.locator(selector)
}

const milliseconds = seconds => (seconds ?? 20) * 1000
const READ_MESSAGES = element => JSON.parse(element.textContent)

/** Runs in the page. Wrapped, because an empty text would read as "not yet". */
function textIfWanted({ selector, text, exactly }) {
  const seen = document.querySelector(selector)?.textContent
  if (seen === undefined) return undefined
  return (exactly ? seen === text : seen.includes(text)) && { text: seen }
}

const COMMANDS = {
  async open({ page = 'main', context = 'main', url, timeoutSeconds }) {
    if (!pages.has(page)) {
      const view = await (await contextOf(context)).newPage()
      const complaints = []
      view.on('pageerror', error => complaints.push(String(error)))
      view.on('console', message => message.type() === 'error' && complaints.push(message.text()))
      pages.set(page, { view, complaints })
    }
    await find(page).view.goto(url, { timeout: milliseconds(timeoutSeconds) })
  },
  fill: ({ text, timeoutSeconds, ...where }) => locate(where).fill(text, { timeout: milliseconds(timeoutSeconds) }),
  click: ({ timeoutSeconds, ...where }) => locate(where).click({ timeout: milliseconds(timeoutSeconds) }),
  text: ({ timeoutSeconds, ...where }) => locate(where).textContent({ timeout: milliseconds(timeoutSeconds) }),
  count: where => locate(where).count(),
  /** Waits until the element's text holds `text`, or is exactly it; answers the text. */
  async waitText({ page, testId, selector, text, exactly = false, timeoutSeconds }) {
    const wanted = { selector: selector ?? `[data-testid="${testId}"]`, text, exactly }
    const seen = await find(page).view.waitForFunction(textIfWanted, wanted, { timeout: milliseconds(timeoutSeconds) })
    return (await seen.jsonValue()).text
  },
  messages: ({ page }) => find(page).view.getByTestId('json').evaluate(READ_MESSAGES),
  evaluate: ({ page, expression }) => find(page).view.evaluate(expression),
  reload: async ({ page }) => { await find(page).view.reload() },
  screenshot: async ({ page, path }) => { await find(page).view.screenshot({ path }) },
  /** The network of a device goes, or comes back. Chromium keeps open streams open: new requests fail. */
  offline: async ({ context, offline }) => (await contextOf(context ?? 'main')).setOffline(offline),
  complaints: ({ page }) => find(page).complaints,
  async close({ page = 'main' }) {
    await find(page).view.close()
    pages.delete(page)
  },
}

serveCommands(COMMANDS, () => browser.close())
