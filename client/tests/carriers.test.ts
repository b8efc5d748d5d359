import { afterEach, beforeEach, describe, expect, test, vi } from 'vitest'
import { type CarrierEvents, type Endpoint, Silence, urlOf } from '../src/carriers/carrier.js'
import { EventStreamCarrier } from '../src/carriers/event-stream.js'
import { LongPollCarrier } from '../src/carriers/long-poll.js'
import { WebSocketCarrier } from '../src/carriers/websocket.js'
import type { Closing } from '../src/connection-state.js'
import type { Said } from '../src/protocol.js'
import { DEFAULT_TIMING } from '../src/timing.js'
import { Journal } from './support/journal.js'
import { ScriptedNetwork } from './support/network.js'

beforeEach(() => void vi.useFakeTimers())
afterEach(() => void vi.useRealTimers())

const flush = () => vi.advanceTimersByTimeAsync(0)

describe('a silence', () => {
  test('is told after its time', () => {
    const told = vi.fn()
    new Silence(told).within(1_000)
    vi.advanceTimersByTime(999)
    expect(told).not.toHaveBeenCalled()
    vi.advanceTimersByTime(1)
    expect(told).toHaveBeenCalledTimes(1)
  })

  test('begins anew with each sound, whatever the traffic, with one timer', () => {
    const told = vi.fn()
    const silence = new Silence(told)
    silence.within(1_000)
    for (let heard = 0; heard < 10; heard += 1) {
      vi.advanceTimersByTime(900)
      silence.heard()
      expect(vi.getTimerCount()).toBe(1)
    }
    expect(told).not.toHaveBeenCalled()
    vi.advanceTimersByTime(999)
    expect(told).not.toHaveBeenCalled()
    vi.advanceTimersByTime(1)
    expect(told).toHaveBeenCalledTimes(1)
  })

  test('may be given another time, which replaces the first', () => {
    const told = vi.fn()
    const silence = new Silence(told)
    silence.within(1_000)
    silence.within(5_000)
    vi.advanceTimersByTime(4_999)
    expect(told).not.toHaveBeenCalled()
    vi.advanceTimersByTime(1)
    expect(told).toHaveBeenCalledTimes(1)
  })

  test('is not told when it is stopped', () => {
    const told = vi.fn()
    const silence = new Silence(told)
    silence.within(1_000)
    silence.stop()
    vi.advanceTimersByTime(10_000)
    expect(told).not.toHaveBeenCalled()
    expect(vi.getTimerCount()).toBe(0)
  })
})

/** What a carrier tells, and the network it tells it of. */
class Told implements CarrierEvents {
  readonly network = new ScriptedNetwork()
  readonly journal = new Journal()
  readonly all: string[] = []
  readonly said_: Said[] = []
  closing: Closing | undefined
  readonly endpoint: Endpoint = {
    base: new URL('http://gateway/under/'),
    client: 'c 1',
    timing: DEFAULT_TIMING,
    fetch: this.network.fetch,
    WebSocket: this.network.WebSocket,
    request: async () => ({ headers: { authorization: 'Bearer a' }, credentials: 'include' }),
  }

  ready(): void {
    this.all.push('ready')
  }

  proven(): void {
    this.all.push('proven')
  }

  said(said: Said): void {
    this.said_.push(said)
    this.all.push(said.type)
  }

  closed(closing: Closing): void {
    this.closing = closing
    this.all.push('closed')
  }
}

const attach = { type: 'attach', id: 'a1', session: 'a/b ü', after: 'cursor' } as const

test('an address has the client in it, and stands under the base', () => {
  const { endpoint } = new Told()
  expect(urlOf(endpoint, 'ws', { one: 'a&b' }).href).toBe(
    'http://gateway/under/gateway/v1/ws?client=c+1&one=a%26b',
  )
})

describe('the WebSocket', () => {
  function open(): { told: Told; carrier: WebSocketCarrier } {
    const told = new Told()
    return { told, carrier: new WebSocketCarrier(told.endpoint, told) }
  }

  test('is ready when it was greeted, and not before', () => {
    const { told } = open()
    const { socket } = told.network
    expect([socket.url.href, socket.protocols]).toEqual([
      'ws://gateway/under/gateway/v1/ws?client=c+1',
      'session-gateway.v1',
    ])
    expect(told.all).toEqual([])
    socket.greets()
    expect(told.all).toEqual(['proven', 'ready', 'hello'])
  })

  test('of a page on https is one on wss', () => {
    const told = new Told()
    new WebSocketCarrier({ ...told.endpoint, base: new URL('https://gateway/') }, told)
    expect(told.network.socket.url.protocol).toBe('wss:')
  })

  test('that says nothing until its deadline is swallowed', () => {
    const { told } = open()
    vi.advanceTimersByTime(DEFAULT_TIMING.helloMs)
    expect(told.closing).toMatchObject({ timedOut: true })
    expect(told.network.socket.isClosed).toBe(true)
  })

  test('that falls silent for two heartbeats is lost, not swallowed', () => {
    const { told } = open()
    told.network.socket.greets({ heartbeat: 10 })
    vi.advanceTimersByTime(15_000)
    told.network.socket.says({ type: 'heartbeat' })
    vi.advanceTimersByTime(19_999)
    expect(told.closing).toBeUndefined()
    vi.advanceTimersByTime(1)
    expect(told.closing).toMatchObject({ timedOut: false })
  })

  test('of another protocol is final', () => {
    const { told } = open()
    told.network.socket.greets({ protocol: 2 })
    expect(told.closing).toMatchObject({ final: true })
    expect(told.closing?.reason).toContain('protocol 2')
    expect(told.all).toEqual(['closed'])
  })

  test('that brings what is none of ours is closed, and nothing after it is heard', () => {
    const { told } = open()
    told.network.socket.greets()
    told.network.socket.frame('{"type":"heartbeat"}\n<html>\n{"type":"hello","protocol":1,"heartbeat":1}')
    expect(told.all).toEqual(['proven', 'ready', 'hello', 'heartbeat', 'closed'])
    told.network.socket.drops()
    expect(told.all.at(-1)).toBe('closed')
    expect(told.all.filter((one) => one === 'closed')).toHaveLength(1)
  })

  test('tells its close code', () => {
    const { told } = open()
    told.network.socket.greets()
    told.network.socket.drops(4509, 'too large')
    expect(told.closing).toEqual({ code: 4509, reason: 'too large' })
  })

  test('is asked when the page wakes, once, and lost when it does not answer', () => {
    const { told, carrier } = open()
    told.network.socket.greets()
    carrier.probe()
    carrier.probe()
    expect(told.network.socket.commands('ping')).toHaveLength(1)
    vi.advanceTimersByTime(DEFAULT_TIMING.probeMs)
    expect(told.closing).toEqual({})
  })

  test('has longer to answer when much is still being written', () => {
    const { told, carrier } = open()
    told.network.socket.greets({ heartbeat: 600 })
    told.network.socket.bufferedAmount = 1_600_000 // at 16 kB/s
    carrier.probe()
    vi.advanceTimersByTime(DEFAULT_TIMING.probeMs + 99_999)
    expect(told.closing).toBeUndefined()
    vi.advanceTimersByTime(1)
    expect(told.closing).toEqual({})
  })

  test('that does not tell what is being written is asked all the same', () => {
    const { told, carrier } = open()
    told.network.socket.greets()
    told.network.socket.bufferedAmount = undefined as unknown as number
    carrier.probe()
    vi.advanceTimersByTime(DEFAULT_TIMING.probeMs - 1)
    expect(told.closing).toBeUndefined()
    vi.advanceTimersByTime(1)
    expect(told.closing).toBeDefined()
  })

  test('lives on when it says anything', () => {
    const { told, carrier } = open()
    told.network.socket.greets()
    carrier.probe()
    told.network.socket.says({ type: 'pong', id: '1' })
    vi.advanceTimersByTime(DEFAULT_TIMING.probeMs)
    expect(told.closing).toBeUndefined()
    carrier.probe()
    expect(told.network.socket.commands('ping')).toHaveLength(2)
  })

  test('closed by its owner tells nothing and keeps no timer', () => {
    const { told, carrier } = open()
    told.network.socket.greets()
    carrier.probe()
    carrier.close()
    told.network.socket.drops()
    told.network.socket.says({ type: 'heartbeat' })
    expect(told.all).toEqual(['proven', 'ready', 'hello'])
    expect(vi.getTimerCount()).toBe(0)
  })

  test('is not there where there is none', () => {
    const told = new Told()
    expect(() => new WebSocketCarrier({ ...told.endpoint, WebSocket: undefined }, told)).toThrow(TypeError)
  })
})

describe('the event stream', () => {
  async function open(): Promise<{ told: Told; carrier: EventStreamCarrier }> {
    const told = new Told()
    const carrier = new EventStreamCarrier(told.endpoint, told)
    await flush()
    return { told, carrier }
  }

  const attached = {
    type: 'attached',
    session: 's',
    cursor: '1.0',
    offset: 0,
    last: 0,
    turns: [],
    heartbeat: 10,
  }

  test('asks with the headers and the credentials of the page, after the cursor', async () => {
    const { told, carrier } = await open()
    expect(told.all).toEqual(['ready'])
    carrier.command(attach)
    await flush()
    const { url, headers, init } = told.network.request('/events')
    expect(url.pathname).toBe('/under/gateway/v1/sessions/a%2Fb%20%C3%BC/events')
    expect([...url.searchParams]).toEqual([
      ['client', 'c 1'],
      ['after', 'cursor'],
    ])
    expect([headers.get('accept'), headers.get('authorization')]).toEqual(['text/event-stream', 'Bearer a'])
    expect([init.credentials, init.cache]).toEqual(['include', 'no-store'])
  })

  test('is proven by its first event, and brings records wherever it is cut', async () => {
    const { told, carrier } = await open()
    carrier.command({ type: 'attach', id: 'a1', session: 's', from: 'running' })
    await flush()
    const request = told.network.request('/events')
    expect(request.url.searchParams.get('from')).toBe('running')
    request.streams()
    await flush()
    expect(told.all).toEqual(['ready'])
    request.event(attached, 'attached')
    await flush()
    expect(told.all).toEqual(['ready', 'proven', 'attached'])
    expect(told.said_[0]).toMatchObject({ id: 'a1', cursor: '1.0' })
    const line = `id: 1.1\ndata: ${JSON.stringify(told.journal.start('t'))}\n\n: heartbeat\n\n`
    for (const part of line) request.writes(part)
    await flush()
    expect(told.said_[1]).toEqual(told.journal.at(1))
  })

  test('that is held back on the way is swallowed', async () => {
    const { told, carrier } = await open()
    carrier.command(attach)
    await flush()
    told.network.request('/events').streams()
    await vi.advanceTimersByTimeAsync(DEFAULT_TIMING.helloMs)
    expect(told.closing).toMatchObject({ timedOut: true })
    expect(told.network.open('/events')).toEqual([])
  })

  test('lives by its comments, and is lost without', async () => {
    const { told, carrier } = await open()
    carrier.command(attach)
    await flush()
    const request = told.network.request('/events')
    request.streams()
    request.event(attached, 'attached')
    await vi.advanceTimersByTimeAsync(19_000)
    request.writes(': heartbeat\n\n')
    await vi.advanceTimersByTimeAsync(19_999)
    expect(told.closing).toBeUndefined()
    await vi.advanceTimersByTimeAsync(1)
    expect(told.closing).toMatchObject({ timedOut: false })
  })

  test('that ends, ends the carrier', async () => {
    const { told, carrier } = await open()
    carrier.command(attach)
    await flush()
    const request = told.network.request('/events')
    request.streams()
    request.event(attached, 'attached')
    request.ends()
    await flush()
    expect(told.closing).toEqual({})
  })

  test('whose session is left ends nothing else', async () => {
    const { told, carrier } = await open()
    carrier.command(attach)
    await flush()
    const request = told.network.request('/events')
    request.streams()
    request.event(attached, 'attached')
    await flush()
    carrier.command({ type: 'detach', id: 'd', session: attach.session })
    expect(request.isAborted).toBe(true)
    await vi.advanceTimersByTimeAsync(60_000)
    expect(told.closing).toBeUndefined()
  })

  test('that is refused by the gateway is answered, and the carrier stays', async () => {
    const { told, carrier } = await open()
    carrier.command(attach)
    await flush()
    const error = { type: 'error', code: 'bad-request', message: 'no', retryable: false }
    told.network.request('/events').answers(error, 400)
    await vi.advanceTimersByTimeAsync(60_000)
    expect(told.said_).toEqual([{ ...error, id: 'a1' }])
    expect(told.closing).toBeUndefined()
  })

  test.each([
    ['<html>', 502],
    ['{"error":"no"}', 403],
    ['{"code":"SERVICE_UNAVAILABLE","message":"upstream down"}', 503],
    ['<html>', 200],
  ])('answered %s by somebody in between does not work here', async (body, status) => {
    const { told, carrier } = await open()
    carrier.command(attach)
    await flush()
    told.network.request('/events').answers(body, status)
    await flush()
    expect(told.closing).toEqual({})
    expect(told.said_).toEqual([]) // nobody is refused by it
    expect(vi.getTimerCount()).toBe(0)
  })

  test('of another kind that never ends is swallowed', async () => {
    const { told, carrier } = await open()
    carrier.command(attach)
    await flush()
    const request = told.network.request('/events')
    request.streams('application/octet-stream')
    request.writes('event: attached\n')
    await vi.advanceTimersByTimeAsync(DEFAULT_TIMING.helloMs - 1)
    expect(told.closing).toBeUndefined()
    await vi.advanceTimersByTimeAsync(1)
    expect(told.closing).toMatchObject({ timedOut: true })
    expect(request.isAborted).toBe(true)
  })

  test('that cannot be had does not work here', async () => {
    const { told, carrier } = await open()
    carrier.command(attach)
    await flush()
    told.network.request('/events').fails()
    await flush()
    expect(told.closing).toEqual({})
  })

  test('posts commands, which say nothing about streams', async () => {
    const { told, carrier } = await open()
    carrier.command({ type: 'cancel', id: 'x1', session: 's' })
    await flush()
    const post = told.network.request('/commands')
    expect([post.init.method, post.headers.get('content-type')]).toEqual(['POST', 'application/json'])
    expect(post.body).toEqual({ type: 'cancel', id: 'x1', session: 's' })
    post.answers({ type: 'cancelled', turns: [] })
    await flush()
    expect(told.all).toEqual(['ready', 'cancelled'])
    expect(told.said_[0]).toMatchObject({ id: 'x1' })
  })

  test.each([400, 403, 413, 414, 422, 431])(
    'has a command refused that somebody in between answers %i, and stays',
    async (status) => {
      const { told, carrier } = await open()
      carrier.command({ type: 'cancel', id: 'x1', session: 's' })
      await flush()
      told.network.request('/commands').answers('<html>413 Request Entity Too Large</html>', status)
      await flush()
      expect(told.said_).toMatchObject([
        { type: 'error', id: 'x1', code: 'refused-on-the-way', retryable: false },
      ])
      expect(told.said_[0]).toMatchObject({ message: expect.stringContaining(String(status)) })
      expect(told.closing).toBeUndefined()
    },
  )

  test.each([
    ['<html>', 502],
    ['{"code":"SERVICE_UNAVAILABLE","message":"upstream down"}', 503],
    ['<html>login</html>', 200],
    ['null', 200],
  ])('whose command is answered %s, %i, does not work here', async (body, status) => {
    const { told, carrier } = await open()
    carrier.command({ type: 'cancel', id: 'x1', session: 's' })
    await flush()
    told.network.request('/commands').answers(body, status)
    await flush()
    expect(told.all).toEqual(['ready', 'closed'])
  })

  test('waits for a large message as long as a slow network takes', async () => {
    const { told, carrier } = await open()
    const command = { type: 'send', id: 'x1', session: 's', turn: 't', body: { text: '' } } as const
    const text = 'x'.repeat(1_600_000 - JSON.stringify(command).length)
    carrier.command({ ...command, body: { text } }) // at 16 kB/s
    await vi.advanceTimersByTimeAsync(DEFAULT_TIMING.requestMs + 99_999)
    expect(told.closing).toBeUndefined()
    expect(told.network.open('/commands')).toHaveLength(1)
    await vi.advanceTimersByTimeAsync(1)
    expect(told.closing).toBeDefined()
    expect(told.network.open('/commands')).toEqual([])
  })

  test('keeps no timer of a command that was answered', async () => {
    const { told, carrier } = await open()
    carrier.command({ type: 'ping', id: 'p' })
    await flush()
    expect(vi.getTimerCount()).toBe(1)
    told.network.request('/commands').answers({ type: 'pong' })
    await flush()
    expect(vi.getTimerCount()).toBe(0)
  })

  test('begins anew when the page wakes', async () => {
    const { told, carrier } = await open()
    carrier.probe()
    expect(told.all).toEqual(['ready', 'closed'])
    carrier.command(attach)
    await flush()
    expect(told.network.requests).toEqual([])
  })

  test('closed by its owner before it began tells nothing', async () => {
    const told = new Told()
    new EventStreamCarrier(told.endpoint, told).close()
    await flush()
    expect(told.all).toEqual([])
  })
})

describe('the long-poll', () => {
  async function open(): Promise<{ told: Told; carrier: LongPollCarrier }> {
    const told = new Told()
    const carrier = new LongPollCarrier(told.endpoint, told)
    await flush()
    carrier.command({ type: 'attach', id: 'a1', session: 's', from: 'running' })
    await flush()
    return { told, carrier }
  }

  const query = ({ url }: { url: URL }) => Object.fromEntries(url.searchParams)

  test('does not wait at first, and then from where the answer ends', async () => {
    const { told } = await open()
    const first = told.network.request('/events')
    expect(query(first)).toEqual({ client: 'c 1', from: 'running', wait: '0' })
    expect(first.headers.get('accept')).toBe('application/json')
    const records = [told.journal.start('t'), told.journal.chunk('t')]
    first.answers({ cursor: '1.2', offset: 2, last: 2, turns: [], records })
    await flush()
    expect(told.all).toEqual(['ready', 'proven', 'attached', 'turn-start', 'chunk'])
    // The answer tells where it ends, and who attached is told where it begins.
    expect(told.said_[0]).toMatchObject({ id: 'a1', offset: 0, cursor: '', last: 2 })
    const second = told.network.request('/events')
    expect(query(second)).toEqual({ client: 'c 1', after: '1.2', wait: '25' })
    second.answers({ cursor: '1.2', offset: 2, last: 2, turns: [], records: [] })
    await flush()
    expect(query(told.network.request('/events'))).toEqual({ client: 'c 1', after: '1.2', wait: '25' })
    expect(told.all).toHaveLength(5)
  })

  test('tells a place that is gone with its first answer', async () => {
    const { told } = await open()
    const answer = { cursor: '2.0', offset: 0, last: 0, turns: [], records: [], resync: 'trimmed' }
    told.network.request('/events').answers(answer)
    await flush()
    expect(told.said_[0]).toMatchObject({ type: 'attached', resync: 'trimmed' })
  })

  test('tells a place that is gone later on, and asks no further', async () => {
    const { told } = await open()
    told.network.request('/events').answers({ cursor: '1.0', offset: 0, last: 0, turns: [], records: [] })
    await flush()
    const answer = { cursor: '2.1', offset: 1, last: 1, turns: [], resync: 'epoch-changed' }
    told.network.request('/events').answers({ ...answer, records: [told.journal.start('t')] })
    await flush()
    expect(told.said_.at(-1)).toEqual({ type: 'resync', session: 's', reason: 'epoch-changed' })
    expect(told.network.requests).toHaveLength(2)
  })

  test('is proven by a command that is answered', async () => {
    const { told, carrier } = await open()
    carrier.command({ type: 'ping', id: 'p' })
    await flush()
    told.network.request('/commands').answers({ type: 'pong' })
    await flush()
    expect(told.all).toEqual(['ready', 'proven', 'pong'])
  })

  test('is not proven by a command that a login page answers', async () => {
    const { told, carrier } = await open()
    carrier.command({ type: 'ping', id: 'p' })
    await flush()
    told.network.request('/commands').answers('<html>login</html>')
    await flush()
    expect(told.all).toEqual(['ready', 'closed'])
  })

  test('has a deadline of its own for each poll, and no other', async () => {
    const { told } = await open()
    const answer = { cursor: '1.0', offset: 0, last: 0, turns: [], records: [] }
    for (let polls = 0; polls < 5; polls += 1) {
      expect(vi.getTimerCount()).toBe(1)
      told.network.request('/events').answers(answer)
      await flush()
    }
    const wait = DEFAULT_TIMING.pollSeconds * 1_000 + DEFAULT_TIMING.requestMs
    await vi.advanceTimersByTimeAsync(wait - 1)
    expect(told.closing).toBeUndefined()
    await vi.advanceTimersByTimeAsync(1)
    expect(told.closing).toBeDefined()
    expect(vi.getTimerCount()).toBe(0)
  })

  test('ends when the headers of the page never come', async () => {
    const told = new Told()
    const endpoint = { ...told.endpoint, request: () => new Promise<never>(() => {}) }
    const carrier = new LongPollCarrier(endpoint, told)
    carrier.command({ type: 'attach', id: 'a1', session: 's', from: 'running' })
    await vi.advanceTimersByTimeAsync(DEFAULT_TIMING.requestMs)
    expect(told.all).toEqual(['ready', 'closed'])
  })

  test('asks no more when its session is left', async () => {
    const { told, carrier } = await open()
    carrier.command({ type: 'detach', id: 'd', session: 's' })
    await flush()
    expect(told.network.open('/events')).toEqual([])
    expect(told.closing).toBeUndefined()
  })

  test('that is refused by the gateway is answered, and the carrier stays', async () => {
    const { told } = await open()
    const error = { code: 'store-unavailable', message: 'no', retryable: true, retryAfter: 3 }
    told.network.request('/events').answers(error, 503)
    await flush()
    expect(told.said_).toEqual([{ ...error, type: 'error', id: 'a1' }])
    expect(told.closing).toBeUndefined()
  })
})
