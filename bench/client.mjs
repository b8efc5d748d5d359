// The real client, told by lines of JSON on stdin what to do; `bench/node.py` starts it. Each line is answered by one.
import { createInterface } from 'node:readline'
import { GatewayChatTransport } from '../client/dist/index.js'

const DELTA = /"delta":"(\d{8})\.(\d{20})"/g
const MESSAGES = [{ id: 'm1', role: 'user', parts: [{ type: 'text', text: 'hello' }] }]

/** CLOCK_MONOTONIC in nanoseconds, as the backend stamps its chunks; `now` below lets that be checked. */
const clock = () => process.hrtime.bigint()

/** Latencies and requests of all turns, while it is open. */
const meter = { isOpen: false, latencies: [], requests: 0 }

const countedFetch = (...request) => {
  if (meter.isOpen) meter.requests += 1
  return fetch(...request)
}

/** One answer: every chunk once and in order, or reading it fails. */
class Answer {
  received = 0
  begun = Promise.withResolvers()
  /** Chunks since the last cut was announced: when written, when had. `undefined`: nobody asks. */
  log = undefined
  #waiting = Promise.withResolvers()

  constructor(reading) {
    this.ended = reading(this)
    this.ended.catch(this.begun.reject)
    this.begun.promise.catch(() => {}) // told by `ended` as well
    this.over = this.ended.then(() => Promise.reject(new Error('the turn ended')))
    this.over.catch(() => {}) // told to whoever waits
  }

  take(index, stamp) {
    if (index !== this.received) throw new Error(`chunk ${index} came where ${this.received} was due`)
    this.received += 1
    const [now, written] = [clock(), BigInt(stamp)]
    if (index === 0) this.begun.resolve(now)
    if (meter.isOpen) meter.latencies.push(Number(now - written))
    this.log?.push({ written, now })
    this.#waiting.resolve()
    this.#waiting = Promise.withResolvers()
  }

  /** Resolves when `found()` finds something among what came. */
  async until(found) {
    for (;;) {
      const it = found()
      if (it !== undefined) return it
      await Promise.race([this.#waiting.promise, this.over])
    }
  }
}

/** What a page does without a gateway: POST, and read the events. The barest reader there is. */
async function fetched(url, body, answer) {
  const response = await fetch(url, {
    method: 'POST',
    body: JSON.stringify(body),
    headers: { 'content-type': 'application/json' },
  })
  if (!response.ok) throw new Error(`the answer was ${response.status}`)
  let rest = ''
  for await (const text of response.body.pipeThrough(new TextDecoderStream())) {
    rest += text
    const end = rest.lastIndexOf('\n\n') + 2
    for (const [, index, stamp] of rest.slice(0, end).matchAll(DELTA)) answer.take(Number(index), stamp)
    rest = rest.slice(end)
  }
}

async function streamed(stream, answer) {
  for await (const chunk of stream) {
    if (chunk.type === 'text-delta') answer.take(Number(chunk.delta.slice(0, 8)), chunk.delta.slice(9))
  }
}

function makeTransport({ port, carrier, timing, order }) {
  return new GatewayChatTransport({
    url: `http://127.0.0.1:${port}`,
    fetch: countedFetch,
    body: { bench: order },
    timing,
    ...(carrier && { carriers: [carrier] }),
  })
}

const ask = (transport, chatId) =>
  transport.sendMessages({ chatId, messages: MESSAGES, trigger: 'submit-message', abortSignal: undefined })

let answers = []
let sessions = []
let transports = []
/** Whether the connection was seen to be gone since the last cut was announced. */
let wasLost = false

const commands = {
  now: async () => ({ now: String(clock()) }),

  /** A tab's storage, empty. */
  tab: async () => {
    const kept = new Map()
    globalThis.sessionStorage = { getItem: (key) => kept.get(key) ?? null, setItem: (key, value) => kept.set(key, value) }
    return {}
  },

  /** One send by a page that was just loaded: nanoseconds until its first chunk. */
  first: async (asked) => {
    const transport = makeTransport(asked)
    const start = clock()
    const stream = await ask(transport, crypto.randomUUID())
    const answer = new Answer((answer) => streamed(stream, answer))
    const at = await answer.begun.promise
    const { carrier } = transport.connection
    await answer.ended
    transport.close()
    return { nanoseconds: Number(at - start), carrier }
  },

  /** So many turns, a client each; without a carrier: by a plain `fetch`. */
  start: async (asked) => {
    sessions = Array.from({ length: asked.turns }, () => crypto.randomUUID())
    if (asked.carrier === null) {
      const url = `http://127.0.0.1:${asked.port}/api/chat`
      const body = (id) => ({ id, messages: MESSAGES, trigger: 'submit-message', bench: asked.order })
      answers = sessions.map((id) => new Answer((answer) => fetched(url, body(id), answer)))
      return {}
    }
    transports = sessions.map(() => makeTransport(asked))
    const streams = await Promise.all(transports.map((transport, index) => ask(transport, sessions[index])))
    answers = streams.map((stream) => new Answer((answer) => streamed(stream, answer)))
    for (const transport of transports) {
      transport.subscribe(() => {
        if (!['live', 'catching-up'].includes(transport.connection.state)) wasLost = true
      })
    }
    return {}
  },

  begun: async () => {
    await Promise.all(answers.map(({ begun }) => begun.promise))
    return {}
  },

  open: async () => {
    Object.assign(meter, { isOpen: true, latencies: [], requests: 0 })
    return {}
  },

  close: async () => {
    meter.isOpen = false
    return { latencies: meter.latencies, requests: meter.requests }
  },

  ended: async () => {
    await Promise.all(answers.map(({ ended }) => ended))
    for (const transport of transports) transport.close()
    return { received: answers.reduce((sum, { received }) => sum + received, 0) }
  },

  /** A cut is to come: wait until all is well. */
  settled: async ({ chunks }) => {
    const [answer] = answers
    const enough = answer.received + chunks
    await answer.until(() => (answer.received >= enough && transports[0].connection.state === 'live') || undefined)
    answer.log = []
    wasLost = false
    return {}
  },

  /** The first chunk that was written after a cut: nanoseconds from the cut until it was had. */
  recovered: async ({ cut }) => {
    const [answer] = answers
    const { now } = await answer.until(() => answer.log.find(({ written }) => written > BigInt(cut)))
    answer.log = undefined
    return { nanoseconds: Number(now - BigInt(cut)), was_lost: wasLost }
  },

  cancel: async () => {
    await Promise.all(transports.map((transport, index) => transport.cancel(sessions[index])))
    for (const transport of transports) transport.close()
    return {}
  },
}

for await (const line of createInterface({ input: process.stdin })) {
  const { do: name, ...asked } = JSON.parse(line)
  const told = await commands[name](asked).catch((error) => ({ error: String(error) }))
  process.stdout.write(`${JSON.stringify(told)}\n`)
}
process.exit(0)
