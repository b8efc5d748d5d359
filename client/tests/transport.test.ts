import type { UIMessage, UIMessageChunk } from 'ai'
import { afterEach, beforeEach, describe, expect, test, vi } from 'vitest'
import { RefusedError } from '../src/errors.js'
import { GatewayChatTransport, type GatewayChatTransportOptions } from '../src/transport.js'
import { Journal } from './support/journal.js'
import { ScriptedNetwork } from './support/network.js'
import { watchUncaught } from './support/uncaught.js'

beforeEach(() => {
  vi.useFakeTimers()
  vi.spyOn(Math, 'random').mockReturnValue(0.5)
})
afterEach(() => void vi.useRealTimers())

const wait = (milliseconds = 0) => vi.advanceTimersByTimeAsync(milliseconds)

class Page {
  readonly network = new ScriptedNetwork()
  readonly journal = new Journal()
  readonly transport: GatewayChatTransport

  constructor(options: GatewayChatTransportOptions = {}) {
    const { WebSocket, fetch } = this.network
    this.transport = new GatewayChatTransport({
      url: 'http://gateway',
      carriers: ['websocket'],
      WebSocket,
      fetch,
      ...options,
    })
  }

  get socket() {
    return this.network.socket
  }

  /** A send, and its turn, as far as the gateway. */
  async sends(abortSignal?: AbortSignal): Promise<{ sending: Outcome; turn: string; id: string }> {
    const messages: UIMessage[] = [{ id: 'u1', role: 'user', parts: [] }]
    const sending = outcome(
      this.transport.sendMessages({
        chatId: 's',
        messages,
        trigger: 'submit-message',
        messageId: undefined,
        abortSignal,
      }),
    )
    await wait()
    if (this.socket.readyState === 0) this.socket.greets()
    const { turn, id } = this.socket.last('send')
    return { sending, turn, id }
  }

  accepts(id: string, turn: string): void {
    this.socket.says({
      type: 'accepted',
      id,
      session: 's',
      turn,
      cursor: this.journal.cursor(this.journal.last),
    })
  }

  resumes(abortSignal?: AbortSignal): Outcome {
    return outcome(this.transport.reconnectToStream({ chatId: 's', ...(abortSignal && { abortSignal }) }))
  }

  /** The attach is answered, and what follows it is pushed. */
  attaches(): void {
    const command = this.socket.last('attach')
    const { attached, offset } = this.journal.attach(command)
    this.socket.says({ ...attached, id: command.id })
    for (const record of this.journal.records) if (record.offset > offset) this.socket.says(record)
  }

  says(turn: string, ...deltas: string[]): void {
    for (const delta of deltas)
      this.socket.says(this.journal.chunk(turn, { type: 'text-delta', id: '1', delta }))
  }
}

interface Outcome {
  value?: ReadableStream<UIMessageChunk> | null
  error?: unknown
}

function outcome(promise: Promise<ReadableStream<UIMessageChunk> | null>): Outcome {
  const seen: Outcome = {}
  promise.then(
    (value) => Object.assign(seen, { value }),
    (error) => Object.assign(seen, { error }),
  )
  return seen
}

/** What a stream has given so far, and what it ended with. */
function reading({ value }: Outcome): { read: string[]; ended?: unknown } {
  const seen: { read: string[]; ended?: unknown } = { read: [] }
  const read = async () => {
    for await (const chunk of value as ReadableStream<UIMessageChunk>) {
      seen.read.push((chunk as { delta: string }).delta)
    }
    seen.ended = 'closed'
  }
  read().catch((error: Error) => {
    seen.ended = error.name
  })
  return seen
}

describe('a send', () => {
  test('resolves when it is accepted, to a stream of its turn', async () => {
    const page = new Page({ body: { model: 'big' }, headers: { Authorization: 'a' }, overlap: 'interrupt' })
    const { sending, turn, id } = await page.sends()
    expect(page.socket.last('send')).toMatchObject({
      session: 's',
      body: { model: 'big', id: 's', messages: [{ id: 'u1' }], trigger: 'submit-message' },
      headers: { authorization: 'a' },
      overlap: 'interrupt',
    })
    expect(sending).toEqual({})
    page.accepts(id, turn)
    await wait()
    const seen = reading(sending)
    page.socket.says(page.journal.start(turn))
    page.says(turn, 'a', 'b')
    page.socket.says(page.journal.end(turn))
    await wait()
    expect(seen).toEqual({ read: ['a', 'b'], ended: 'closed' })
    expect(page.socket.commands('detach')).toHaveLength(1)
  })

  test('that is refused rejects, and listens no longer', async () => {
    const page = new Page()
    const { sending, id } = await page.sends()
    page.socket.says({ type: 'error', id, code: 'busy', message: 'no', retryable: true })
    await wait()
    expect(sending.error).toBeInstanceOf(RefusedError)
    expect(page.transport.position('s')).toEqual({ offset: 0, last: 0 })
  })

  test('goes on through a lost connection, each chunk once', async () => {
    const page = new Page()
    const { sending, turn, id } = await page.sends()
    page.accepts(id, turn)
    await wait()
    const seen = reading(sending)
    page.socket.says(page.journal.start(turn))
    page.says(turn, 'a')
    page.socket.drops()
    page.transport.reconnect()
    page.socket.greets()
    page.journal.chunk(turn, { type: 'text-delta', id: '1', delta: 'b' })
    page.attaches()
    page.socket.says(page.journal.end(turn))
    await wait()
    expect(seen).toEqual({ read: ['a', 'b'], ended: 'closed' })
  })

  test('given up fails as a lost network, and is resumed where it was', async () => {
    const page = new Page({ timing: { giveUpMs: 0 } })
    const { sending, turn, id } = await page.sends()
    page.accepts(id, turn)
    await wait()
    const seen = reading(sending)
    page.socket.says(page.journal.start(turn))
    page.says(turn, 'a')
    page.socket.drops()
    await wait(1_000)
    page.socket.drops()
    await wait()
    expect(seen).toEqual({ read: ['a'], ended: 'TypeError' })
    const resumed = page.resumes()
    page.journal.chunk(turn, { type: 'text-delta', id: '1', delta: 'b' })
    page.socket.greets()
    page.attaches()
    await wait()
    const rest = reading(resumed)
    await wait()
    expect(rest.read).toEqual(['b'])
  })

  test('whose signal fires detaches, and ends nothing', async () => {
    const page = new Page()
    const leaving = new AbortController()
    const { sending, turn, id } = await page.sends(leaving.signal)
    page.accepts(id, turn)
    await wait()
    const seen = reading(sending)
    leaving.abort()
    await wait()
    expect(seen.ended).toBe('AbortError')
    expect(page.socket.commands('cancel')).toEqual([])
    expect(page.socket.commands('detach')).toHaveLength(1)
  })

  test('whose signal fires cancels, where that is what it means', async () => {
    const page = new Page({ onAbort: 'cancel' })
    const leaving = new AbortController()
    const { turn } = await page.sends(leaving.signal)
    leaving.abort()
    expect(page.socket.commands('cancel')).toMatchObject([{ session: 's', turn }])
  })

  test('whose signal fires after its end cancels nothing', async () => {
    const page = new Page({ onAbort: 'cancel' })
    const leaving = new AbortController()
    const { turn, id } = await page.sends(leaving.signal)
    page.accepts(id, turn)
    page.socket.says(page.journal.start(turn))
    page.socket.says(page.journal.end(turn))
    leaving.abort()
    expect(page.socket.commands('cancel')).toEqual([])
  })

  test('that was aborted before is not sent', async () => {
    const page = new Page()
    const sending = outcome(
      page.transport.sendMessages({
        chatId: 's',
        messages: [],
        trigger: 'submit-message',
        messageId: undefined,
        abortSignal: AbortSignal.abort(),
      }),
    )
    await wait()
    expect(sending.error).toMatchObject({ name: 'AbortError' })
    expect(page.network.sockets).toEqual([])
  })
})

describe('a send whose request is being made', () => {
  const waits: Record<string, (until: Promise<object>) => GatewayChatTransportOptions> = {
    headers: (until) => ({ headers: async () => ({ ...(await until) }) }),
    body: (until) => ({ body: () => until }),
    prepareSendMessagesRequest: (until) => ({
      prepareSendMessagesRequest: async () => ({ body: await until }),
    }),
  }
  const names = Object.keys(waits)

  /** It is asked for, on a connection that is live; `go` is when all it waits for is there. */
  async function preparing(
    name: string,
    abortSignal?: AbortSignal,
  ): Promise<{ page: Page; sending: Outcome; go: () => void }> {
    let go = () => {}
    const promise = new Promise<object>((resolve) => {
      go = () => resolve({})
    })
    const page = new Page(waits[name]?.(promise))
    page.transport.gateway.attach('s', { record() {} })
    page.socket.greets()
    page.attaches()
    const sending = outcome(
      page.transport.sendMessages({
        chatId: 's',
        messages: [],
        trigger: 'submit-message',
        messageId: undefined,
        abortSignal,
      }),
    )
    await wait()
    return { page, sending, go }
  }

  test.each(names)('is not sent when all is cancelled while its %s is waited for', async (name) => {
    const { page, sending, go } = await preparing(name)
    const cancelling = page.transport.cancel('s')
    page.socket.says({ type: 'cancelled', id: page.socket.last('cancel').id, turns: [] })
    expect(await cancelling).toEqual([])
    go()
    await wait()
    expect(sending.error).toMatchObject({ name: 'AbortError' })
    expect(page.socket.commands('send')).toEqual([])
  })

  test.each(names)('is not sent when its signal fires while its %s is waited for', async (name) => {
    const leaving = new AbortController()
    const { page, sending, go } = await preparing(name, leaving.signal)
    leaving.abort()
    go()
    await wait()
    expect(sending.error).toMatchObject({ name: 'AbortError' })
    expect(page.socket.commands('send')).toEqual([])
  })

  test('is sent when something else is cancelled, or something before it', async () => {
    const { page, go } = await preparing('headers')
    outcome(page.transport.cancel('s', { turn: 'x' }).then(() => null))
    outcome(page.transport.cancel('other').then(() => null))
    go()
    await wait()
    expect(page.socket.commands('send')).toHaveLength(1)
    const cancelled = await preparing('headers')
    outcome(cancelled.page.transport.cancel('s').then(() => null))
    cancelled.go()
    await wait()
    const { id } = cancelled.page.socket.last('cancel')
    cancelled.page.socket.says({ type: 'cancelled', id, turns: [] })
    await cancelled.page.sends()
    expect(cancelled.page.socket.commands('send')).toHaveLength(1)
  })
})

test('a send that could not begin is followed by nobody: a later cancel is of all that run', async () => {
  const page = new Page({ url: undefined })
  const send = page.transport.sendMessages({
    chatId: 's',
    messages: [],
    trigger: 'submit-message',
    messageId: undefined,
    abortSignal: undefined,
  })
  await expect(send).rejects.toThrow('give its `url`')
  vi.stubGlobal('location', { href: 'http://gateway/' })
  outcome(page.transport.cancel('s').then(() => null))
  page.socket.greets()
  expect(page.socket.commands('cancel').map(({ turn }) => turn)).toEqual([undefined])
})

test('a client is named when it is needed: the global scope of a Worker has no dice', () => {
  const noDice = () => {
    throw new Error('disallowed operation called within global scope')
  }
  vi.stubGlobal('crypto', { getRandomValues: noDice, randomUUID: noDice })
  const { transport } = new Page()
  expect(transport.connection.state).toBe('idle')
  vi.unstubAllGlobals()
  expect(transport.client).toMatch(/^c-/)
  expect(transport.client).toBe(transport.client)
})

describe('a resume', () => {
  test('is of the newest that runs, from its first chunk', async () => {
    const page = new Page()
    page.journal.start('old')
    page.journal.chunk('old')
    page.journal.start('t')
    page.journal.chunk('t', { type: 'text-delta', id: '1', delta: 'a' })
    const resumed = page.resumes()
    page.socket.greets()
    expect(page.socket.last('attach')).toMatchObject({ from: 'running' })
    page.attaches()
    await wait()
    const seen = reading(resumed)
    page.socket.says(page.journal.end('t'))
    await wait()
    expect(seen).toEqual({ read: ['a'], ended: 'closed' })
  })

  test('of nothing is null, and leaves', async () => {
    const page = new Page()
    const resumed = page.resumes()
    page.socket.greets()
    page.attaches()
    await wait()
    expect(resumed).toEqual({ value: null })
    expect(page.socket.commands('detach')).toHaveLength(1)
  })

  test('goes on when its place is gone: told from the start, each chunk once', async () => {
    const page = new Page()
    page.journal.start('t')
    page.journal.chunk('t', { type: 'text-delta', id: '1', delta: 'a' })
    const resumed = page.resumes()
    page.socket.greets()
    page.attaches()
    await wait()
    const seen = reading(resumed)
    await wait()
    page.socket.says({ type: 'resync', session: 's', reason: 'too-far-behind' })
    page.attaches()
    page.says('t', 'b')
    page.socket.says(page.journal.end('t'))
    await wait()
    expect(seen).toEqual({ read: ['a', 'b'], ended: 'closed' })
  })

  test('that is aborted while it asks rejects, and leaves', async () => {
    const page = new Page()
    const leaving = new AbortController()
    const resumed = page.resumes(leaving.signal)
    page.socket.greets()
    leaving.abort()
    await wait()
    expect(resumed.error).toMatchObject({ name: 'AbortError' })
    expect(page.socket.commands('detach')).toHaveLength(1)
  })
})

describe('a cancel', () => {
  test('is of all that run, and of those on their way', async () => {
    const page = new Page()
    const { turn } = await page.sends()
    const cancelling = page.transport.cancel('s')
    const [own, all] = page.socket.commands('cancel')
    expect([own?.turn, all?.turn]).toEqual([turn, undefined])
    page.socket.says({ type: 'cancelled', id: own?.id, turns: [{ turn, result: 'unknown' }] })
    page.socket.says({
      type: 'cancelled',
      id: all?.id,
      turns: [
        { turn, result: 'cancelled' },
        { turn: 'x', result: 'already-ended' },
      ],
    })
    expect(await cancelling).toEqual([
      { turn, result: 'cancelled' },
      { turn: 'x', result: 'already-ended' },
    ])
  })

  test('of one turn is of that one', async () => {
    const page = new Page()
    const cancelling = page.transport.cancel('s', { turn: 'x' })
    page.socket.greets()
    const { id, turn } = page.socket.last('cancel')
    expect(turn).toBe('x')
    page.socket.says({ type: 'cancelled', id, turns: [{ turn: 'x', result: 'cancelled' }] })
    expect(await cancelling).toEqual([{ turn: 'x', result: 'cancelled' }])
  })
})

test('each end is told to all who ask for it, as long as they do', async () => {
  const told: string[] = []
  const page = new Page({ onTurnEnd: ({ reason }) => told.push(`option ${reason}`) })
  const leave = page.transport.onTurnEnd(({ turn, chatId }) => told.push(`${chatId} ${turn}`))
  const { turn, id } = await page.sends()
  page.accepts(id, turn)
  page.socket.says(page.journal.start(turn))
  page.socket.says(page.journal.end(turn, { reason: 'cancelled', by: { client: 'x' } }))
  leave()
  expect(told).toEqual(['option cancelled', `s ${turn}`])
  const { turn: next, id: nextId } = await page.sends()
  page.accepts(nextId, next)
  page.socket.says(page.journal.start(next))
  page.socket.says(page.journal.end(next))
  expect(told).toEqual(['option cancelled', `s ${turn}`, 'option complete'])
})

test('an end whose listener throws is told to all others, and its stream ends', async () => {
  const uncaught = watchUncaught()
  const told: string[] = []
  const page = new Page({
    onTurnEnd: () => {
      throw new Error('a bug of the page')
    },
  })
  page.transport.onTurnEnd(({ reason }) => told.push(reason))
  const { sending, turn, id } = await page.sends()
  page.accepts(id, turn)
  await wait()
  const seen = reading(sending)
  page.socket.says(page.journal.start(turn))
  page.says(turn, 'a')
  page.socket.says(page.journal.end(turn))
  await wait()
  expect(seen).toEqual({ read: ['a'], ended: 'closed' })
  expect([told, uncaught]).toEqual([['complete'], ['a bug of the page']])
  expect(page.socket.commands('detach')).toHaveLength(1)
})

test('a snapshot of the connection is what useSyncExternalStore asks for', () => {
  const page = new Page({ client: 'me' })
  const { subscribe, close } = page.transport
  const told = vi.fn()
  const leave = subscribe(told)
  expect(page.transport.client).toBe('me')
  expect(page.transport.connection).toBe(page.transport.connection)
  close()
  expect(told).toHaveBeenCalledTimes(1)
  expect(page.transport.connection.state).toBe('closed')
  leave()
})
