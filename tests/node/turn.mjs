// One request to the backend: what it reports, what holds it, what ends it.
import { setTimeout as delay } from 'node:timers/promises'
import { writeLine } from './stdio.mjs'

let happenings = 0

/** One line on stdout: what happened, its number and when (epoch milliseconds, with fractions). */
export function report(event, facts = {}) {
  const at = performance.timeOrigin + performance.now()
  writeLine({ event, n: ++happenings, at, ...facts })
}

const DEFAULTS = { kind: 'text', chunks: 20, delayMs: 0, plumb: true }
const KIND_DEFAULTS = { long: { chunks: 2000 }, hold: { hold: 5 }, slow: { holdAnswer: true } }

/** The scenario of a body: its own `scenario`, or the JSON in its last user message, or plain text. */
export function scenarioOf(body) {
  const given = body?.scenario ?? fromMessage(body) ?? {}
  return { ...DEFAULTS, ...KIND_DEFAULTS[given.kind], ...given }
}

function fromMessage(body) {
  const messages = body?.messages ?? [body?.message]
  const user = messages.findLast(message => message?.role === 'user')
  const text = user?.parts?.map(part => part.text ?? '').join('') ?? ''
  return text.startsWith('{') ? JSON.parse(text) : undefined
}

let turnsSoFar = 0
const running = new Set()
const releasedEarly = new Map()

/** The running turns with these fields, e.g. `{ key }` or `{ id }` of the chat. */
export function turnsWith(fields) {
  const wanted = Object.entries(fields)
  return [...running].filter(turn => wanted.every(([name, value]) => turn[name] === value))
}

/** Lets `count` more deltas pass in the turns of a key; kept for the next turn when there is none yet. */
export function release(key, count) {
  const turns = turnsWith({ key })
  if (turns.length === 0) releasedEarly.set(key, (releasedEarly.get(key) ?? 0) + count)
  for (const turn of turns) turn.release(count)
  return turns.length
}

export class Turn {
  steps = 0
  parts = 0
  deltas = 0
  controller = new AbortController()
  #waiting = Promise.withResolvers()
  #failure

  constructor({ id, scenario, response }) {
    this.number = ++turnsSoFar
    this.id = id
    this.scenario = scenario
    this.key = scenario.key ?? id
    this.response = response
    this.allowed = scenario.hold === undefined ? Infinity : scenario.hold + (releasedEarly.get(this.key) ?? 0)
    this.mayAnswer = !scenario.holdAnswer
    releasedEarly.delete(this.key)
    running.add(this)
  }

  report(event, facts) {
    report(event, { id: this.id, key: this.key, ...facts })
  }

  #wake() {
    this.#waiting.resolve()
    this.#waiting = Promise.withResolvers()
  }

  release(count) {
    this.allowed += count
    this.#wake()
  }

  answer() {
    this.mayAnswer = true
    this.#wake()
  }

  fail(message) {
    this.#failure = new Error(message)
    this.#wake()
  }

  /** Waits until the next delta may be said; rejects when the model was aborted or told to fail. */
  async pass(signal) {
    if (this.scenario.delayMs > 0) await delay(this.scenario.delayMs, undefined, { signal })
    if (this.deltas >= this.allowed) this.report('hold', { deltas: this.deltas })
    while (this.deltas >= this.allowed && !this.#failure) await this.#wakeOrAbort(signal)
    if (this.#failure) throw this.#failure
  }

  async #wakeOrAbort(signal) {
    signal?.throwIfAborted()
    const aborted = Promise.withResolvers()
    const abort = () => aborted.reject(signal.reason)
    signal?.addEventListener('abort', abort, { once: true })
    try {
      await Promise.race([this.#waiting.promise, aborted.promise])
    } finally {
      signal?.removeEventListener('abort', abort)
    }
  }

  /** Throws in the middle of a `kind: error` answer, as a provider's broken connection does. */
  breakWhenDue() {
    const due = this.scenario.errorAfter ?? Math.floor(this.scenario.chunks / 2)
    if (this.scenario.kind === 'error' && this.deltas >= due) throw new Error('the model broke')
  }

  async untilAnswer() {
    while (!this.mayAnswer) await this.#waiting.promise
  }

  /** Nothing can be told to this turn any more. */
  forget() {
    running.delete(this)
  }
}
