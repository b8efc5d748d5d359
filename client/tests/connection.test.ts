import { afterEach, beforeEach, describe, expect, test, vi } from 'vitest'
import { type ConnectionStatus, GatewayConnection } from '../src/connection.js'
import type { GatewayConnectionOptions } from '../src/endpoint.js'
import { ClosedError, RefusedError } from '../src/errors.js'
import type { SessionListener } from '../src/feed.js'
import type { ResyncReason, SessionRecord } from '../src/protocol.js'
import { Journal } from './support/journal.js'
import { ScriptedNetwork } from './support/network.js'
import { watchUncaught } from './support/uncaught.js'

beforeEach(() => {
  vi.useFakeTimers()
  vi.spyOn(Math, 'random').mockReturnValue(0.5) // the dice of each backoff
})
afterEach(() => void vi.useRealTimers())

const wait = (milliseconds = 0) => vi.advanceTimersByTimeAsync(milliseconds)

class Page {
  readonly network = new ScriptedNetwork()
  readonly journal = new Journal()
  readonly statuses: string[] = []
  readonly connection: GatewayConnection
  #refused: unknown

  constructor(options: GatewayConnectionOptions = {}) {
    const { WebSocket, fetch } = this.network
    this.connection = new GatewayConnection({
      url: 'http://gateway',
      WebSocket,
      fetch,
      client: 'me',
      ...options,
    })
    this.connection.subscribe(() => this.statuses.push(status(this.connection.status)))
  }

  get socket() {
    return this.network.socket
  }

  /** The gateway answers the last attach of the newest socket. */
  attaches(): void {
    const command = this.socket.last('attach')
    this.socket.says({ ...this.journal.attach(command).attached, id: command.id })
  }

  /** A node that stops refuses the last send of the newest socket, unless it has. */
  refuses(): boolean {
    const send = this.socket.commands('send').at(-1)
    if (!send || send === this.#refused) return false
    this.#refused = send
    const why = { code: 'draining', message: 'unable to send', retryable: true, retryAfter: 1 }
    this.socket.says({ type: 'error', id: send.id, ...why })
    return true
  }

  /** The stream of the last attach begins. */
  async streams(): Promise<void> {
    await wait()
    const request = this.network.request('/events')
    const { after, from } = Object.fromEntries(request.url.searchParams) as Record<string, string>
    request.streams()
    const place = { ...(after && { after }), ...(from && { from: from as 'start' }) }
    request.event({ ...this.journal.attach(place).attached, heartbeat: 25 }, 'attached')
    await wait()
  }

  push(record: SessionRecord): void {
    this.socket.says(record)
  }

  /** Until a socket is opened. */
  async tries(): Promise<void> {
    const { length } = this.network.sockets
    for (let waited = 0; this.network.sockets.length === length; waited += 1) {
      if (waited > 60_000) throw new Error('unable to see another attempt; there was none in a minute')
      await wait(1)
    }
  }

  /** Time passes, and the gateway is heard. */
  async lives(milliseconds: number): Promise<void> {
    for (let left = milliseconds; left > 0; left -= 20_000) {
      await wait(Math.min(left, 20_000))
      this.socket.says({ type: 'heartbeat' })
    }
  }
}

function status({ state, carrier }: ConnectionStatus): string {
  return `${state} ${carrier}`
}

/** The offsets told, and what else. */
class Heard implements SessionListener {
  readonly all: (number | string)[] = []

  record({ offset }: SessionRecord): void {
    this.all.push(offset)
  }

  reset(reason: ResyncReason): void {
    this.all.push(reason)
  }

  failed(error: Error): void {
    this.all.push(error.name)
  }
}

function outcome(promise: Promise<unknown>): { is?: string; value?: unknown } {
  const seen: { is?: string; value?: unknown } = {}
  promise.then(
    (value) => Object.assign(seen, { is: 'resolved', value }),
    (value) => Object.assign(seen, { is: 'rejected', value }),
  )
  return seen
}

describe('a connection', () => {
  test('is made when it is needed, and not before', () => {
    const page = new Page()
    expect(page.network.sockets).toEqual([])
    expect(page.connection.status).toEqual({ state: 'idle', carrier: 'websocket' })
    page.connection.attach('s', new Heard())
    expect(page.socket.url.href).toBe('ws://gateway/gateway/v1/ws?client=me')
  })

  test('tells what a UI shows, each once: connecting, catching up, live', () => {
    const page = new Page()
    page.journal.start('t')
    page.connection.attach('s', new Heard())
    page.socket.greets()
    page.attaches()
    const before = page.connection.status
    page.push(page.journal.at(1) as SessionRecord)
    const live = page.connection.status
    page.push(page.journal.chunk('t'))
    expect(page.statuses).toEqual(['connecting websocket', 'catching-up websocket', 'live websocket'])
    expect(before.state).toBe('catching-up')
    expect(page.connection.status).toBe(live)
  })

  test('goes on after the last record when it is lost', async () => {
    const page = new Page()
    const heard = new Heard()
    page.connection.attach('s', heard)
    page.socket.greets()
    page.attaches()
    page.push(page.journal.start('t'))
    const first = page.socket
    first.drops()
    expect(page.connection.status.state).toBe('connecting')
    page.journal.chunk('t')
    await wait(249)
    expect(page.network.sockets).toHaveLength(1)
    await wait(1)
    page.socket.greets()
    expect(page.socket.last('attach')).toMatchObject({ session: 's', after: '1.1' })
    page.attaches()
    page.push(page.journal.at(2) as SessionRecord)
    first.says(page.journal.chunk('t')) // nothing of the old one is heard
    expect(heard.all).toEqual([1, 2])
    expect(page.connection.position('s')).toEqual({ offset: 2, last: 2 })
  })

  test('is offline when attempts fail in a row, and says so', async () => {
    const page = new Page({ carriers: ['websocket'] })
    page.connection.attach('s', new Heard())
    for (let attempts = 0; attempts < 3; attempts += 1) {
      page.socket.drops()
      await page.tries()
    }
    expect(page.statuses).toEqual(['connecting websocket', 'offline websocket'])
    page.socket.greets()
    expect(page.connection.status.state).toBe('catching-up')
  })

  test('that is closed after each greeting waits ever longer, until it was of use', async () => {
    const page = new Page({ carriers: ['websocket'] })
    page.connection.attach('s', new Heard())
    const waits: number[] = []
    const loses = async () => {
      const lostAt = performance.now()
      page.socket.drops(1011)
      await page.tries()
      waits.push(performance.now() - lostAt)
    }
    for (let times = 0; times < 3; times += 1) {
      page.socket.greets()
      page.socket.says({ type: 'heartbeat' })
      await loses()
    }
    page.socket.greets()
    page.attaches()
    await loses()
    expect(waits).toEqual([250, 500, 1_000, 250])
  })

  test('is offline where the page says that there is no network', () => {
    vi.stubGlobal('navigator', { onLine: false })
    const page = new Page()
    page.connection.attach('s', new Heard())
    expect(page.connection.status.state).toBe('offline')
  })

  test('is tried at once when it is asked to, whatever the backoff says', () => {
    const page = new Page()
    page.connection.attach('s', new Heard())
    page.socket.greets()
    page.socket.drops()
    expect(page.network.sockets).toHaveLength(1)
    page.connection.reconnect()
    expect(page.network.sockets).toHaveLength(2)
    page.connection.reconnect() // it is being opened: that is not begun again
    expect(page.network.sockets).toHaveLength(2)
    expect(page.socket.isClosed).toBe(false)
  })

  test('that is being opened keeps its own deadline when the page wakes', async () => {
    const page = new Page()
    page.connection.attach('s', new Heard())
    page.connection.reconnect()
    await wait(3_999)
    expect(page.network.sockets).toHaveLength(1)
    page.socket.greets()
    expect(page.connection.status.carrier).toBe('websocket')
  })

  test('that is open is checked when the page wakes, and made anew when it does not answer', async () => {
    const page = new Page()
    page.connection.attach('s', new Heard())
    page.socket.greets()
    page.connection.reconnect()
    expect(page.socket.commands('ping')).toHaveLength(1)
    await wait(3_000 + 250)
    expect(page.network.sockets).toHaveLength(2)
  })

  test('is closed after a while when nothing is attached, and made again when it is needed', async () => {
    const page = new Page()
    const detach = page.connection.attach('s', new Heard())
    page.socket.greets()
    page.attaches()
    detach()
    expect(page.socket.last('detach')).toMatchObject({ session: 's' })
    await page.lives(59_999)
    expect(page.socket.isClosed).toBe(false)
    await wait(1)
    expect(page.socket.isClosed).toBe(true)
    expect(page.connection.status.state).toBe('idle')
    expect(vi.getTimerCount()).toBe(0)
    page.connection.attach('s', new Heard())
    expect(page.network.sockets).toHaveLength(2)
  })

  test('stays when it is needed again in time', async () => {
    const page = new Page()
    const detach = page.connection.attach('s', new Heard())
    page.socket.greets()
    page.attaches()
    detach()
    await page.lives(30_000)
    page.connection.attach('s', new Heard())
    await page.lives(60_000)
    expect(page.network.sockets).toHaveLength(1)
    expect(page.socket.isClosed).toBe(false)
  })

  test('comes back when the gateway says that it goes away, when it says', async () => {
    const page = new Page()
    page.connection.attach('s', new Heard())
    page.socket.greets()
    page.attaches()
    page.socket.says({ type: 'goaway', after: 700 })
    page.push(page.journal.start('t')) // until then it serves as before
    await wait(699)
    expect([page.network.sockets.length, page.connection.position('s').offset]).toEqual([1, 1])
    await wait(2)
    expect(page.network.sockets).toHaveLength(2)
    expect(page.network.sockets[0]?.isClosed).toBe(true)
    page.socket.greets()
    expect(page.socket.last('attach')).toMatchObject({ after: '1.1' })
  })

  test('is changed at once when its node refuses because it stops, and the command is given on the next', async () => {
    const page = new Page()
    page.connection.attach('s', new Heard())
    page.socket.greets()
    page.attaches()
    page.socket.says({ type: 'goaway', after: 7_000 })
    const sent = page.connection.send('s', { turn: 't', body: {} })
    page.refuses()
    await wait(1)
    expect(page.network.sockets).toHaveLength(2)
    page.socket.greets()
    page.attaches()
    const { id, ...given } = page.socket.last('send')
    expect(given).toMatchObject({ session: 's', turn: 't' })
    page.socket.says({ type: 'accepted', id, session: 's', turn: 't', cursor: '1.0' })
    expect(await sent).toMatchObject({ turn: 't' })
    await wait(20_000) // the moment of the old node is past
    expect(page.network.sockets).toHaveLength(2)
  })

  test('is changed at once also when the moment to leave is told behind the refusal', async () => {
    const page = new Page()
    page.connection.attach('s', new Heard())
    page.socket.greets()
    page.attaches()
    page.connection.send('s', { turn: 't', body: {} })
    page.refuses()
    page.socket.says({ type: 'goaway', after: 7_000 })
    await wait(1)
    expect(page.network.sockets).toHaveLength(2)
    page.socket.greets()
    page.attaches()
    page.socket.says({ type: 'goaway', after: 700 }) // the next node stops as well, at a moment of its own
    await wait(701)
    expect(page.network.sockets).toHaveLength(3)
  })

  test('is not changed again and again when there is no other node', async () => {
    const page = new Page()
    page.connection.attach('s', new Heard())
    page.socket.greets()
    page.attaches()
    const failed = vi.fn()
    page.connection.send('s', { turn: 't', body: {} }).catch(failed)
    let given = 0
    for (let seconds = 0; seconds < 60; seconds += 1) {
      const isNew = page.network.sockets.length
      if (page.refuses()) given += 1
      await wait(1_000)
      if (page.network.sockets.length === isNew) continue
      page.socket.greets()
      page.attaches()
    }
    expect(failed).not.toHaveBeenCalled()
    expect(given).toBeGreaterThan(20)
    expect(page.network.sockets.length).toBeGreaterThan(3) // in case another one has come
    expect(page.network.sockets.length).toBeLessThan(9)
  })
})

describe('closed for good', () => {
  test('by the gateway: all fail, nothing is tried again, and the status says why', async () => {
    const page = new Page()
    const heard = new Heard()
    page.connection.attach('s', heard)
    page.socket.greets()
    const sent = outcome(page.connection.send('s', { body: {} }))
    page.socket.drops(4509, 'too large')
    await wait(600_000)
    expect(heard.all).toEqual(['ClosedError'])
    expect(sent.value).toBeInstanceOf(ClosedError)
    expect(sent.value).toMatchObject({ code: 4509, message: expect.stringContaining('too large') })
    expect(page.connection.status).toMatchObject({ state: 'closed', error: sent.value })
    expect(page.network.sockets).toHaveLength(1)
    expect(() => page.connection.attach('s', heard)).toThrow(ClosedError)
    await expect(page.connection.send('s', { body: {} })).rejects.toThrow('too large')
  })

  test('by its owner: all fail, and no timer is left', async () => {
    const page = new Page()
    const heard = new Heard()
    const detach = page.connection.attach('s', heard)
    page.socket.greets()
    page.connection.close()
    page.connection.close()
    detach()
    page.connection.reconnect()
    expect(heard.all).toEqual(['ClosedError'])
    expect(page.socket.isClosed).toBe(true)
    expect(page.statuses.at(-1)).toBe('closed websocket')
    expect(page.connection.status).not.toHaveProperty('error')
    await expect(page.connection.cancel('s')).rejects.toThrow(ClosedError)
    expect(vi.getTimerCount()).toBe(0)
  })

  test('by its owner: no timer is left, though who fails leaves', () => {
    const page = new Page()
    const detach = page.connection.attach('s', { record() {}, failed: () => detach() })
    page.socket.greets()
    page.attaches()
    page.connection.close()
    expect(vi.getTimerCount()).toBe(0)
  })

  test('by a subscriber, as soon as it works: no better carrier is tried', async () => {
    const page = new Page({ carriers: ['websocket', 'sse'], timing: { reprobeMs: 1_000 } })
    page.connection.attach('s', new Heard())
    await wait(4_000)
    page.connection.subscribe(() => {
      if (page.connection.status.state === 'catching-up') page.connection.close()
    })
    await page.streams()
    await wait(60_000)
    expect(page.connection.status.state).toBe('closed')
    expect(page.network.sockets).toHaveLength(1)
    expect(vi.getTimerCount()).toBe(0)
  })

  test('before it was ever open', () => {
    const page = new Page()
    page.connection.close()
    expect(page.connection.status.state).toBe('closed')
  })
})

describe('a network', () => {
  test('that swallows WebSockets and streams gets long-polls, and what worked is remembered', async () => {
    const items = new Map<string, string>()
    const sessionStorage = {
      getItem: (key: string) => items.get(key) ?? null,
      setItem: (key: string, value: string) => void items.set(key, value),
    }
    vi.stubGlobal('sessionStorage', sessionStorage)
    const page = new Page()
    const heard = new Heard()
    page.journal.start('t')
    page.connection.attach('s', heard)
    await wait(4_000)
    expect(page.connection.status).toEqual({ state: 'connecting', carrier: 'sse' })
    page.network.request('/events').streams() // its first bytes are held back
    await wait(4_000)
    expect(page.connection.status.carrier).toBe('long-poll')
    const { attached } = page.journal.attach({})
    page.network.request('/events').answers({ ...attached, offset: 1, records: page.journal.records })
    await wait()
    expect(page.connection.status).toEqual({ state: 'live', carrier: 'long-poll' })
    expect(heard.all).toEqual([1])
    page.connection.close()

    const reloaded = new Page()
    reloaded.connection.attach('s', new Heard())
    expect(reloaded.connection.status.carrier).toBe('long-poll')
    reloaded.connection.close()
  })

  test('that refuses WebSockets gets streams after the second time', async () => {
    const page = new Page()
    page.connection.attach('s', new Heard())
    page.socket.drops()
    await wait(250)
    expect(page.network.sockets).toHaveLength(2)
    page.socket.drops()
    await page.streams()
    expect(page.connection.status).toEqual({ state: 'live', carrier: 'sse' })
    page.connection.close()
  })

  test('without AbortSignal.any works on both HTTP carriers', async () => {
    vi.spyOn(AbortSignal, 'any').mockImplementation(() => {
      throw new TypeError('AbortSignal.any is not a function')
    })
    const page = new Page({ carriers: ['sse', 'long-poll'] })
    page.connection.attach('s', new Heard())
    await wait()
    page.network.request('/events').streams() // its first bytes are held back
    await wait(4_000)
    page.network.request('/events').answers({ ...page.journal.attach({}).attached, records: [] })
    await wait()
    expect(page.connection.status).toEqual({ state: 'live', carrier: 'long-poll' })
    const sent = outcome(page.connection.send('s', { turn: 'u', body: {} }))
    await wait()
    const accepted = { type: 'accepted', session: 's', turn: 'u', cursor: '' }
    page.network.request('/commands').answers(accepted)
    await wait()
    expect(sent.is).toBe('resolved')
    page.connection.close()
    expect(page.network.open('')).toEqual([])
  })

  test('that makes something else of streams gets long-polls', async () => {
    const page = new Page({ carriers: ['sse', 'long-poll'] })
    page.connection.attach('s', new Heard())
    await wait()
    page.network.request('/events').streams('application/octet-stream')
    await wait(4_000)
    expect(page.connection.status.carrier).toBe('long-poll')
    page.connection.close()
  })

  test('whose login page answers 200 works on no carrier', async () => {
    const page = new Page({ carriers: ['sse', 'long-poll'] })
    page.connection.attach('s', new Heard())
    outcome(page.connection.send('s', { body: {} }))
    for (let waited = 0; waited < 8_000; waited += 10) {
      for (const path of ['/commands', '/events'])
        for (const request of page.network.open(path)) request.answers('<html>login</html>')
      await wait(10)
    }
    expect(new Set(page.statuses.map((one) => one.split(' ')[0]))).toEqual(new Set(['connecting', 'offline']))
    page.connection.close()
  })

  test('without WebSockets gets streams at once', async () => {
    const page = new Page({ WebSocket: null as unknown as typeof WebSocket })
    page.connection.attach('s', new Heard())
    await page.streams()
    expect(page.connection.status.carrier).toBe('sse')
    page.connection.close()
  })

  test('that gets better is found out, and changed over in the middle of a turn without a loss', async () => {
    const page = new Page({ carriers: ['websocket', 'sse'] })
    const heard = new Heard()
    page.connection.attach('s', heard)
    await wait(4_000)
    await page.streams()
    const stream = page.network.request('/events')
    stream.event(page.journal.start('t'))
    await wait(30_000)
    stream.writes(': heartbeat\n\n')
    await wait(30_000)
    expect(page.network.sockets).toHaveLength(2)
    stream.event(page.journal.chunk('t')) // the stream goes on while the better one is tried
    await wait()
    expect(heard.all).toEqual([1, 2])
    const sent = outcome(page.connection.send('s', { turn: 'u', body: {} }))
    page.socket.greets()
    expect(page.connection.status.carrier).toBe('websocket')
    expect(stream.isAborted).toBe(true)
    expect(page.socket.last('attach')).toMatchObject({ after: '1.2' })
    expect(page.socket.last('send')).toMatchObject({ turn: 'u' }) // its answer went with the stream
    page.journal.chunk('t')
    page.attaches()
    page.push(page.journal.at(3) as SessionRecord)
    page.push(page.journal.start('u'))
    await wait()
    expect(heard.all).toEqual([1, 2, 3, 4])
    expect(sent.is).toBe('resolved')
    expect(page.connection.status).toEqual({ state: 'live', carrier: 'websocket' })
    page.connection.close()
  })

  test('is not tried any longer for a connection that is closed', async () => {
    const page = new Page({ carriers: ['websocket', 'sse'] })
    page.connection.attach('s', new Heard())
    await wait(4_000)
    await page.streams()
    await wait(30_000)
    page.network.request('/events').writes(': heartbeat\n\n')
    await wait(30_000)
    expect(page.network.sockets).toHaveLength(2)
    page.connection.close()
    expect(page.socket.isClosed).toBe(true)
    expect(vi.getTimerCount()).toBe(0)
  })

  test('that does not get better is asked ever more rarely, and the stream stays', async () => {
    const page = new Page({ carriers: ['websocket', 'sse'] })
    page.connection.attach('s', new Heard())
    await wait(4_000)
    await page.streams()
    const stream = page.network.request('/events')
    const tried = [page.network.sockets.length]
    for (let minutes = 0; minutes < 8; minutes += 1) {
      for (let parts = 0; parts < 3; parts += 1) {
        stream.writes(': heartbeat\n\n')
        await wait(20_000)
      }
      tried.push(page.network.sockets.length)
    }
    expect(tried).toEqual([1, 2, 2, 2, 3, 3, 3, 3, 4])
    expect(stream.isAborted).toBe(false)
    page.connection.close()
  })

  test('that cuts streams now and then is tried all the same', async () => {
    const page = new Page({ carriers: ['websocket', 'sse'] })
    page.connection.attach('s', new Heard())
    await wait(4_000)
    for (let cuts = 0; cuts < 6; cuts += 1) {
      await page.streams()
      await wait(30_000)
      page.network.request('/events').ends()
      await wait(250)
    }
    await page.streams()
    await wait(45_000)
    page.network.request('/events').writes(': heartbeat\n\n')
    await wait(15_000)
    expect(page.network.sockets).toHaveLength(2)
    page.connection.close()
  })

  test('on which the better one had worked is asked soon', async () => {
    const page = new Page({ carriers: ['websocket', 'sse'] })
    page.connection.attach('s', new Heard())
    page.socket.greets()
    page.attaches()
    page.socket.drops()
    await wait(250)
    await wait(4_000)
    await page.streams()
    const before = page.network.sockets.length
    await wait(5_000)
    expect(page.network.sockets).toHaveLength(before + 1)
    page.connection.close()
  })

  test('on which polls work is asked for streams, with a session to try them on', async () => {
    const page = new Page({ carriers: ['sse', 'long-poll'] })
    const heard = new Heard()
    page.journal.start('t')
    page.connection.attach('s', heard)
    await wait(4_000)
    const { attached } = page.journal.attach({})
    page.network
      .request('/events')
      .answers({ ...attached, cursor: '1.1', offset: 1, records: page.journal.records })
    await wait(30_000)
    const poll = page.network.request('/events')
    poll.answers({ ...attached, cursor: '1.1', offset: 1, records: [] })
    await wait(30_000)
    const [trial] = page.network
      .open('/events')
      .filter(({ headers }) => headers.get('accept')?.includes('stream'))
    expect(trial?.url.searchParams.get('after')).toBe('1.1')
    await page.streams()
    expect(page.connection.status.carrier).toBe('sse')
    await page.streams()
    page.network.request('/events').event(page.journal.chunk('t'))
    await wait()
    expect(heard.all).toEqual([1, 2])
    expect(
      page.network.open('/events').every(({ headers }) => headers.get('accept') === 'text/event-stream'),
    ).toBe(true)
    page.connection.close()
  })
})

test('a session that was left while a better carrier was tried on it is left there as well', async () => {
  const page = new Page({ carriers: ['sse', 'long-poll'] })
  const detach = page.connection.attach('left', new Heard())
  page.connection.attach('kept', new Heard())
  await wait(4_000)
  for (const poll of page.network.open('/events')) {
    const session = poll.url.pathname.split('/').at(-2)
    poll.answers({ session, cursor: '1.1', offset: 1, last: 1, turns: [], records: [] })
  }
  await wait(38_000)
  for (const poll of page.network.open('/events'))
    poll.answers({ cursor: '1.1', offset: 1, last: 1, turns: [], records: [] })
  await wait(22_000)
  const [trial] = page.network
    .open('/events')
    .filter(({ headers }) => headers.get('accept') === 'text/event-stream')
  expect(trial?.url.pathname).toContain('/left/')
  detach()
  trial?.streams()
  const attached = { type: 'attached', session: 'left', cursor: '1.1', offset: 1, last: 1, turns: [] }
  trial?.event({ ...attached, heartbeat: 25 }, 'attached')
  await wait()
  expect(page.connection.status.carrier).toBe('sse')
  expect(trial?.isAborted).toBe(true)
  expect(page.network.open('/events').map(({ url }) => url.pathname.split('/').at(-2))).toEqual(['kept'])
  page.connection.close()
})

describe('who listens and throws', () => {
  class Throwing implements SessionListener {
    throws(what: string): never {
      throw new Error(what)
    }

    attached = () => this.throws('attached')
    record = () => this.throws('record')
    caughtUp = () => this.throws('caughtUp')
    reset = () => this.throws('reset')
    failed = () => this.throws('failed')
  }

  test('costs nobody else anything, and it is told to the page', async () => {
    const uncaught = watchUncaught()
    const page = new Page()
    const heard = new Heard()
    page.connection.attach('s', new Throwing())
    page.connection.attach('s', heard)
    page.socket.greets()
    page.attaches()
    page.push(page.journal.start('t'))
    page.socket.says({ type: 'resync', session: 's', reason: 'too-far-behind' })
    page.attaches()
    page.push(page.journal.at(1) as SessionRecord)
    page.push(page.journal.chunk('t'))
    expect(page.socket.commands('attach')).toHaveLength(2) // nobody asks again for what was had
    page.connection.close()
    await wait()
    expect(heard.all).toEqual([1, 'too-far-behind', 1, 2, 'ClosedError'])
    const told = ['attached', 'caughtUp', 'record', 'reset', 'attached', 'record', 'caughtUp', 'record']
    expect(uncaught).toEqual([...told, 'failed'])
  })

  test('to the status costs nobody else anything', async () => {
    const uncaught = watchUncaught()
    const page = new Page()
    const { connection } = page
    connection.subscribe(() => {
      throw new Error(connection.status.state)
    })
    const later: string[] = []
    connection.subscribe(() => later.push(connection.status.state))
    connection.attach('s', new Heard())
    page.socket.greets()
    page.attaches()
    expect(later).toEqual(['connecting', 'catching-up', 'live'])
    page.socket.drops(4500, 'no')
    await wait()
    expect(later.at(-1)).toBe('closed')
    expect(new Set(uncaught)).toEqual(new Set(later))
  })
})

test('who is detached by what another is told hears nothing more', () => {
  const page = new Page()
  const heard = new Heard()
  page.connection.attach('s', { record: () => detach() })
  const detach = page.connection.attach('s', heard)
  page.socket.greets()
  page.attaches()
  page.push(page.journal.start('t'))
  page.push(page.journal.chunk('t'))
  expect(heard.all).toEqual([])
})

describe('given up', () => {
  function cut(): { page: Page; patient: Heard; impatient: Heard } {
    const page = new Page({ carriers: ['websocket'], timing: { giveUpMs: 20_000 } })
    const [patient, impatient] = [new Heard(), new Heard()]
    page.connection.listen('s', patient, { from: 'start' }, true)
    page.connection.listen('s', impatient, { from: 'start' }, false)
    page.socket.greets()
    page.attaches()
    return { page, patient, impatient }
  }

  async function outage(page: Page): Promise<void> {
    for (let attempts = 0; attempts < 12; attempts += 1) {
      page.socket.drops()
      if (page.connection.status.state === 'idle') return
      await page.tries()
    }
  }

  test('who does not bear it fails, who does stays, and attempts go on', async () => {
    const { page, patient, impatient } = cut()
    const sent = outcome(page.connection.send('s', { body: {} }))
    await outage(page)
    expect([patient.all, impatient.all]).toEqual([[], ['TypeError']])
    expect(sent.value).toBeInstanceOf(TypeError)
    page.socket.drops()
    await page.tries()
    page.socket.greets()
    page.attaches()
    page.push(page.journal.start('t'))
    expect(patient.all).toEqual([1])
    expect(impatient.all).toEqual(['TypeError'])
  })

  test('a later send works when the network is back', async () => {
    const { page } = cut()
    await outage(page)
    const sent = outcome(page.connection.send('s', { turn: 'u', body: {} }))
    page.socket.greets()
    page.attaches()
    const { id } = page.socket.last('send')
    page.socket.says({ type: 'accepted', id, session: 's', turn: 'u', cursor: '1.0' })
    await wait()
    expect(sent).toMatchObject({ is: 'resolved', value: { turn: 'u' } })
  })

  test('also where each attempt is greeted, and closed', async () => {
    const { page, patient, impatient } = cut()
    const sent = outcome(page.connection.send('s', { body: {} }))
    const lostAt = performance.now()
    page.socket.drops(1011)
    while (!impatient.all.length && performance.now() - lostAt < 60_000) {
      await page.tries()
      page.socket.greets()
      page.socket.drops(1011)
    }
    expect(performance.now() - lostAt).toBeLessThan(60_000)
    await wait()
    expect([patient.all, impatient.all, sent.is]).toEqual([[], ['TypeError'], 'rejected'])
    page.connection.close()
  })

  test('with nobody left it rests', async () => {
    const page = new Page({ carriers: ['websocket'], timing: { giveUpMs: 20_000 } })
    const heard = new Heard()
    page.connection.listen('s', heard, { turn: 'u' }, false)
    await outage(page)
    expect(heard.all).toEqual(['TypeError'])
    expect(page.connection.status.state).toBe('idle')
    const attempts = page.network.sockets.length
    await wait(60_000)
    expect(page.network.sockets).toHaveLength(attempts)
    expect(vi.getTimerCount()).toBe(0)
  })

  test('not before each carrier was tried: a laptop that slept for hours has tried nothing', async () => {
    const page = new Page({ carriers: ['websocket', 'sse'], timing: { giveUpMs: 0 } })
    const impatient = new Heard()
    page.connection.listen('s', impatient, { from: 'start' }, false)
    page.socket.greets()
    page.socket.drops()
    await page.tries()
    page.socket.drops()
    await page.tries()
    expect(impatient.all).toEqual([])
    page.socket.drops()
    await wait()
    expect(impatient.all).toEqual([])
    page.network.request('/events').fails()
    await wait()
    expect(impatient.all).toEqual(['TypeError'])
  })
})

describe('commands', () => {
  test('that were not answered are given once on each connection', async () => {
    const page = new Page()
    const sent = outcome(
      page.connection.send('s', { turn: 'u', body: { a: 1 }, path: '/x', overlap: 'reject' }),
    )
    const cancelled = outcome(page.connection.cancel('s', 'v'))
    expect(page.socket.sent).toEqual([])
    page.socket.greets()
    const command = { type: 'send', session: 's', turn: 'u', body: { a: 1 }, path: '/x', overlap: 'reject' }
    expect(page.socket.sent).toMatchObject([{ type: 'cancel', turn: 'v' }, command])
    page.socket.says({ type: 'cancelled', id: page.socket.last('cancel').id, turns: [] })
    page.socket.drops()
    await wait(250)
    page.socket.greets()
    expect(page.socket.sent).toMatchObject([command])
    const { id } = page.socket.last('send')
    page.socket.says({ type: 'accepted', id, session: 's', turn: 'u', cursor: '1.0', duplicate: true })
    await wait()
    expect(cancelled).toEqual({ is: 'resolved', value: [] })
    expect(sent).toMatchObject({ is: 'resolved', value: { duplicate: true } })
  })

  test('to cancel all that runs name what is on its way, and come before it', async () => {
    const page = new Page()
    outcome(page.connection.send('s', { turn: 'u', body: {} }))
    const cancelled = outcome(page.connection.cancel('s'))
    page.socket.greets()
    const [first, second, third] = page.socket.sent
    expect([first, second, third]).toMatchObject([
      { type: 'cancel', turn: 'u' },
      { type: 'cancel' },
      { type: 'send' },
    ])
    expect(second).not.toHaveProperty('turn')
    page.socket.says({ type: 'cancelled', id: first?.id, turns: [{ turn: 'u', result: 'unknown' }] })
    page.socket.says({ type: 'cancelled', id: second?.id, turns: [{ turn: 'w', result: 'cancelled' }] })
    await wait()
    const value = [
      { turn: 'u', result: 'unknown' },
      { turn: 'w', result: 'cancelled' },
    ]
    expect(cancelled).toEqual({ is: 'resolved', value })
  })

  test('that are refused say why', async () => {
    const page = new Page()
    const sent = outcome(page.connection.send('s', { body: {} }))
    page.socket.greets()
    const { id } = page.socket.last('send')
    page.socket.says({ type: 'error', id, code: 'busy', message: 'unable to', retryable: true })
    await wait()
    expect(sent.value).toBeInstanceOf(RefusedError)
    expect(sent.value).toMatchObject({ code: 'busy' })
  })

  test('that are refused on the way are refused, and nothing else ends', async () => {
    const page = new Page({ carriers: ['sse'] })
    page.connection.attach('s', new Heard())
    await page.streams()
    const sent = outcome(page.connection.send('s', { body: {} }))
    await wait()
    page.network.request('/commands').answers('<html>413 Request Entity Too Large</html>', 413)
    await wait(10_000)
    expect(sent.value).toBeInstanceOf(RefusedError)
    expect(sent.value).toMatchObject({ code: 'refused-on-the-way', retryable: false })
    expect(page.connection.status.state).toBe('live')
    expect(page.network.requests).toHaveLength(2)
    page.connection.close()
  })

  test('that a load balancer refuses for now are posted again', async () => {
    const page = new Page({ carriers: ['sse'] })
    page.connection.attach('s', new Heard())
    await page.streams()
    const sent = outcome(page.connection.send('s', { turn: 'u', body: {} }))
    await wait()
    const refusal = { code: 'SERVICE_UNAVAILABLE', message: 'upstream down' }
    page.network.request('/commands').answers(refusal, 503)
    await wait(250)
    await page.streams()
    expect(sent).toEqual({})
    expect(page.network.request('/commands').body).toMatchObject({ type: 'send', turn: 'u' })
    page.connection.close()
  })

  test('on the HTTP carriers are posted, and the sender asks for its records', async () => {
    const page = new Page({ carriers: ['sse'] })
    const heard = new Heard()
    page.connection.listen('s', heard, { turn: 'u' }, false)
    const sent = outcome(page.connection.send('s', { turn: 'u', body: {} }))
    await wait()
    expect(page.network.open('/events')).toEqual([])
    page.journal.start('u')
    const post = page.network.request('/commands')
    post.answers({ type: 'accepted', session: 's', turn: 'u', cursor: '1.0' })
    await page.streams()
    expect(sent.is).toBe('resolved')
    const events = page.network.request('/events')
    expect(events.url.searchParams.get('after')).toBe('1.0')
    events.event(page.journal.at(1) as SessionRecord)
    await wait()
    expect(heard.all).toEqual([1])
    page.connection.close()
  })

  test('a send of a socket attaches its sender, which asks for nothing', async () => {
    const page = new Page()
    const heard = new Heard()
    page.connection.listen('s', heard, { turn: 'u' }, false)
    void page.connection.send('s', { turn: 'u', body: {} })
    page.socket.greets()
    const { id } = page.socket.last('send')
    page.socket.says(
      { type: 'accepted', id, session: 's', turn: 'u', cursor: '1.0' },
      page.journal.start('u'),
      page.journal.chunk('u'),
    )
    expect(heard.all).toEqual([1, 2])
    expect(page.socket.commands('attach')).toEqual([])
    page.socket.drops()
    await wait(250)
    page.socket.greets()
    expect(page.socket.last('attach')).toMatchObject({ after: '1.2' })
    expect(page.socket.commands('send')).toEqual([])
  })
})

test('a send that is accepted once more is looked for where it began, when its sender is attached elsewhere', () => {
  const page = new Page()
  const heard = new Heard()
  page.connection.attach('s', new Heard(), { from: 'running' })
  page.connection.listen('s', heard, { turn: 'u' }, false)
  void page.connection.send('s', { turn: 'u', body: {} })
  page.journal.start('u')
  page.journal.end('u')
  page.socket.greets()
  page.attaches() // at the end: the turn has ended, and somebody else has read it
  const { id } = page.socket.last('send')
  page.socket.says({ type: 'accepted', id, session: 's', turn: 'u', cursor: '1.0', duplicate: true })
  expect(page.socket.last('attach')).toMatchObject({ after: '1.0' })
})

describe('an attach', () => {
  test('that is refused for long is asked again before that, and by no timer that outlives its owner', async () => {
    const page = new Page()
    page.connection.attach('s', new Heard(), { from: 'running' })
    page.socket.greets()
    const refuse = () => {
      const { id } = page.socket.last('attach')
      const refused = { type: 'error', id, code: 'store-unavailable', message: 'no', retryable: true }
      page.socket.says({ ...refused, retryAfter: 1e9 })
    }
    refuse()
    await wait(page.connection.timing.backoffMaxMs)
    expect(page.socket.sent.filter(({ type }) => type === 'attach')).toHaveLength(2)
    refuse()
    page.connection.close()
    expect(vi.getTimerCount()).toBe(0)
  })

  test('that is refused for now is asked again', async () => {
    const page = new Page()
    const heard = new Heard()
    page.connection.attach('s', heard, { from: 'running' })
    page.socket.greets()
    const { id } = page.socket.last('attach')
    const error = {
      type: 'error',
      id,
      code: 'store-unavailable',
      message: 'no',
      retryable: true,
      retryAfter: 2,
    }
    page.socket.says(error)
    await wait(1_499)
    expect(page.socket.commands('attach')).toHaveLength(1)
    await wait(1)
    expect(page.socket.commands('attach')).toHaveLength(2)
    expect(page.socket.last('attach')).toMatchObject({ from: 'running' })
    expect(heard.all).toEqual([])
  })

  test('that is refused for good fails its listeners, and no others', () => {
    const page = new Page()
    const [heard, other] = [new Heard(), new Heard()]
    page.connection.attach('s', heard, { after: 'nonsense' })
    page.connection.attach('other', other)
    page.socket.greets()
    const [command] = page.socket.commands('attach')
    page.socket.says({ type: 'error', id: command?.id, code: 'bad-request', message: 'no', retryable: false })
    expect([heard.all, other.all]).toEqual([['RefusedError'], []])
    expect(page.connection.position('s')).toEqual({ offset: 0, last: 0 })
  })

  test('of several sessions goes on for each after a lost connection', async () => {
    const page = new Page()
    page.connection.attach('a', new Heard())
    page.connection.attach('b', new Heard(), { after: 'x' })
    page.socket.greets()
    expect(page.socket.commands('attach')).toMatchObject([{ session: 'a' }, { session: 'b', after: 'x' }])
    page.socket.drops()
    await wait(250)
    page.socket.greets()
    expect(page.socket.commands('attach')).toMatchObject([{ session: 'a' }, { session: 'b', after: 'x' }])
  })

  test('is followed by a reset when the gateway says that the place is gone', () => {
    const page = new Page()
    const heard = new Heard()
    page.connection.attach('s', heard)
    page.socket.greets()
    page.attaches()
    page.push(page.journal.start('t'))
    page.socket.says({ type: 'resync', session: 's', reason: 'too-far-behind' })
    expect(page.socket.last('attach')).not.toHaveProperty('after')
    page.attaches()
    page.push(page.journal.at(1) as SessionRecord)
    expect(heard.all).toEqual([1, 'too-far-behind', 1])
  })

  test('whose records have a hole asks again after the last one had', () => {
    const page = new Page()
    const heard = new Heard()
    page.connection.attach('s', heard)
    page.socket.greets()
    page.attaches()
    page.push(page.journal.start('t'))
    page.journal.chunk('t')
    page.push(page.journal.chunk('t'))
    expect(page.socket.last('attach')).toMatchObject({ after: '1.1' })
    page.attaches()
    page.push(page.journal.at(2) as SessionRecord)
    page.push(page.journal.at(3) as SessionRecord)
    expect(heard.all).toEqual([1, 2, 3])
  })

  test('that has left says so once, and what still comes is not heard', () => {
    const page = new Page()
    const heard = new Heard()
    const detach = page.connection.attach('s', heard)
    page.socket.greets()
    page.attaches()
    detach()
    detach()
    page.push(page.journal.start('t'))
    expect(heard.all).toEqual([])
    expect(page.socket.commands('detach')).toHaveLength(1)
  })
})

test('a subscriber that has left is told nothing', () => {
  const page = new Page()
  const told = vi.fn()
  const unsubscribe = page.connection.subscribe(told)
  page.connection.attach('s', new Heard())
  expect(told).toHaveBeenCalledTimes(1)
  unsubscribe()
  page.socket.greets()
  page.connection.close()
  expect(told).toHaveBeenCalledTimes(1)
})

test('what is said of things to come is ignored', () => {
  const page = new Page()
  page.connection.attach('s', new Heard())
  page.socket.greets()
  page.socket.says(
    { type: 'presence', session: 's' },
    { type: 'ok', id: '1' },
    { type: 'attached', id: 'nobody' },
  )
  page.push({ ...page.journal.start('t'), session: 'nobody' })
  expect(page.connection.status.state).toBe('catching-up')
})

describe('the gateway', () => {
  test('is the page it is used on', () => {
    vi.stubGlobal('location', { href: 'https://app.example/chat/1?x' })
    const page = new Page({ url: undefined })
    page.connection.attach('s', new Heard())
    expect(page.socket.url.href).toBe('wss://app.example/gateway/v1/ws?client=me')
  })

  test.each([
    ['http://gateway/under', 'ws://gateway/under/gateway/v1/ws?client=me'],
    ['http://gateway/under/', 'ws://gateway/under/gateway/v1/ws?client=me'],
  ])('may stand under a path: %s', (url, address) => {
    const page = new Page({ url })
    page.connection.attach('s', new Heard())
    expect(page.socket.url.href).toBe(address)
  })

  test('must be named where there is no page, when it is needed and not before', () => {
    const page = new Page({ url: undefined })
    expect(() => page.connection.attach('s', new Heard())).toThrow('give its `url`')
  })
})
