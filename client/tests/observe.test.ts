import type { UIMessage, UIMessageChunk } from 'ai'
import { afterEach, beforeEach, describe, expect, test, vi } from 'vitest'
import { type ObservableChat, observe, withQuestion } from '../src/observe.js'
import type { SessionRecord, TurnStart } from '../src/protocol.js'
import { GatewayChatTransport } from '../src/transport.js'
import { Journal } from './support/journal.js'
import { ScriptedNetwork } from './support/network.js'

beforeEach(() => void vi.useFakeTimers())
afterEach(() => void vi.useRealTimers())

const settle = () => vi.advanceTimersByTimeAsync(50)

function message(id: string, role: UIMessage['role'] = 'user', text = id): UIMessage {
  return { id, role, parts: [{ type: 'text', text }] }
}

function start(...messages: unknown[]): TurnStart {
  return { ...new Journal().start('t'), messages }
}

describe('the messages as they were when a turn was sent', () => {
  const [u1, a1, u2, a2] = [
    message('u1'),
    message('a1', 'assistant'),
    message('u2'),
    message('a2', 'assistant'),
  ]
  const table: [name: string, before: UIMessage[], sent: unknown[], after: UIMessage[]][] = [
    ['a first question', [], [u1], [u1]],
    ['a new question comes at the end', [u1, a1], [u2], [u1, a1, u2]],
    ['a question that is there stands once', [u1, a1, u2], [u2], [u1, a1, u2]],
    ['an answer that was cut off goes, and is told again', [u1, a1, u2, a2], [u2], [u1, a1, u2]],
    [
      'an edited question takes what stands behind it along',
      [u1, a1, u2, a2],
      [{ ...u1, parts: [] }],
      [{ ...u1, parts: [] }],
    ],
    [
      'a continuation goes on with its message, as it was sent',
      [u1, a1],
      [message('a1', 'assistant', 'result')],
      [u1, message('a1', 'assistant', 'result')],
    ],
    ['the last one sent counts', [u1], [u1, a1, u2], [u1, u2]],
    ['none leaves all as it is', [u1, a1], [], [u1, a1]],
    [
      'a question without an id is named by its turn',
      [u1, a1],
      [{ role: 'user', parts: u2.parts }],
      [u1, a1, { ...u2, id: 't' }],
    ],
    [
      'a question without parts has none, so that no page breaks on it',
      [u1],
      [{ id: 'u2', role: 'user' }],
      [u1, { ...u2, parts: [] }],
    ],
    ['what is no object leaves all as it is', [u1], ['hello'], [u1]],
    ['what is null leaves all as it is', [u1], [null], [u1]],
  ]
  test.each(table)('%s', (_, before, sent, after) => {
    const copy = structuredClone(before)
    expect(withQuestion(before, start(...sent))).toEqual(after)
    expect(before).toEqual(copy)
  })
})

/** A chat as `observe` needs it: it reads what it is handed, as the SDK does. */
class Chat implements ObservableChat {
  readonly id = 's'
  messages: UIMessage[] = []
  status: ObservableChat['status'] = 'ready'
  /** What each answer was, and how it ended. */
  readonly answers: string[] = []
  readonly #transport: GatewayChatTransport

  constructor(transport: GatewayChatTransport) {
    this.#transport = transport
  }

  async resumeStream(): Promise<void> {
    const stream = await this.#transport.reconnectToStream({ chatId: this.id })
    if (!stream) return
    this.status = 'streaming'
    let answer = this.messages.at(-1)?.id ?? ''
    try {
      for await (const chunk of stream) answer += ` ${(chunk as { delta: string }).delta}`
      this.answers.push(answer)
      this.status = 'ready'
    } catch (error) {
      this.answers.push(`${answer} ${(error as Error).name}`)
      this.status = (error as Error).name === 'AbortError' ? 'ready' : 'error'
    }
  }
}

class Page {
  readonly network = new ScriptedNetwork()
  readonly journal = new Journal()
  readonly ends: string[] = []
  readonly transport: GatewayChatTransport
  readonly chat: Chat

  constructor() {
    const { WebSocket, fetch } = this.network
    this.transport = new GatewayChatTransport({
      url: 'http://gateway',
      carriers: ['websocket'],
      WebSocket,
      fetch,
      onTurnEnd: ({ turn, reason }) => this.ends.push(`${turn} ${reason}`),
    })
    this.chat = new Chat(this.transport)
  }

  /** It is observed, on a connection that is live. */
  observed(): () => void {
    const stop = observe(this.chat, this.transport)
    if (this.network.sockets.length === 0) return stop
    this.network.socket.greets()
    this.attaches()
    return stop
  }

  attaches(): void {
    const command = this.network.socket.last('attach')
    const { attached, offset } = this.journal.attach(command)
    this.network.socket.says({ ...attached, id: command.id })
    for (const record of this.journal.records.filter((record) => record.offset > offset)) this.push(record)
  }

  push(record: SessionRecord): void {
    this.network.socket.says(record)
  }

  /** Somebody asks, and is answered in parts. */
  asks(turn: string, question: UIMessage, ...deltas: string[]): void {
    const begun = this.journal.start(turn)
    Object.assign(begun, { messages: [question] })
    this.push(begun)
    this.says(turn, ...deltas)
  }

  says(turn: string, ...deltas: string[]): void {
    for (const delta of deltas) this.push(this.journal.chunk(turn, { type: 'text-delta', id: '1', delta }))
  }

  ends_(turn: string, reason: 'complete' | 'cancelled' | 'error' = 'complete'): void {
    this.push(this.journal.end(turn, { reason }))
  }
}

describe('a chat that is observed', () => {
  test('shows the question and the answer of somebody else', async () => {
    const page = new Page()
    page.observed()
    page.asks('t', message('u1'), 'a', 'b')
    await settle()
    expect(page.chat.messages).toEqual([message('u1')])
    expect(page.chat.status).toBe('streaming')
    page.says('t', 'c')
    page.ends_('t')
    await settle()
    expect(page.chat.answers).toEqual(['u1 a b c'])
    expect(page.ends).toEqual(['t complete'])
  })

  test('asks for what runs, so that a reload shows it', async () => {
    const page = new Page()
    page.journal.start('old')
    page.journal.end('old')
    Object.assign(page.journal.start('t'), { messages: [message('u1')] })
    page.journal.chunk('t', { type: 'text-delta', id: '1', delta: 'a' })
    page.observed()
    expect(page.network.socket.last('attach')).toMatchObject({ from: 'running' })
    page.ends_('t')
    await settle()
    expect(page.chat.answers).toEqual(['u1 a'])
  })

  test('shows one after the other, in order, and the second when the first is done', async () => {
    const page = new Page()
    page.observed()
    page.asks('t', message('u1'), 'a')
    page.asks('u', message('u2'), 'x')
    await settle()
    expect(page.chat.messages.map(({ id }) => id)).toEqual(['u1'])
    page.says('t', 'b')
    page.ends_('u')
    page.ends_('t')
    await settle()
    expect(page.chat.answers).toEqual(['u1 a b', 'u2 x'])
  })

  test('waits while it is busy with its own', async () => {
    const page = new Page()
    page.observed()
    page.chat.status = 'submitted'
    page.asks('t', message('u1'), 'a')
    await vi.advanceTimersByTimeAsync(5_000)
    expect(page.chat.messages).toEqual([])
    page.chat.status = 'ready'
    page.ends_('t')
    await settle()
    expect(page.chat.answers).toEqual(['u1 a'])
  })

  test('does not show its own', async () => {
    const page = new Page()
    page.observed()
    const messages = [message('u1')]
    const sending = page.transport.sendMessages({
      chatId: 's',
      messages,
      trigger: 'submit-message',
      messageId: undefined,
      abortSignal: undefined,
    })
    await settle()
    const { turn } = page.network.socket.last('send')
    page.asks(turn, message('u1'), 'a')
    page.ends_(turn)
    const read: UIMessageChunk[] = []
    for await (const chunk of await sending) read.push(chunk)
    await settle()
    expect(read).toHaveLength(1)
    expect(page.chat.answers).toEqual([])
    expect(page.ends).toEqual([`${turn} complete`])
  })

  test('goes on after an answer that failed', async () => {
    const page = new Page()
    page.observed()
    page.asks('t', message('u1'), 'a')
    page.ends_('t', 'error')
    page.asks('u', message('u2'), 'x')
    page.ends_('u', 'cancelled')
    await settle()
    expect(page.chat.answers).toEqual(['u1 a TurnError', 'u2 x AbortError'])
  })

  test('observed anew does not show again what it has shown', async () => {
    const page = new Page()
    const stop = page.observed()
    page.asks('t', message('u1'), 'a')
    await settle()
    const again = observe(page.chat, page.transport)
    page.attaches()
    page.ends_('t')
    await settle()
    stop()
    again()
    expect(page.chat.answers).toEqual(['u1 a'])
  })

  test('goes on through a lost connection and a reset, each part once', async () => {
    const page = new Page()
    page.observed()
    page.asks('t', message('u1'), 'a', 'b')
    await settle()
    page.network.socket.drops()
    page.transport.reconnect()
    page.journal.chunk('t', { type: 'text-delta', id: '1', delta: 'c' })
    page.network.socket.greets()
    page.attaches()
    page.network.socket.says({ type: 'resync', session: 's', reason: 'too-far-behind' })
    page.attaches()
    page.ends_('t')
    await settle()
    expect(page.chat.answers).toEqual(['u1 a b c'])
  })

  test('ended shows to its end what it shows, and nothing else', async () => {
    const page = new Page()
    const stop = page.observed()
    page.asks('t', message('u1'), 'a')
    page.asks('u', message('u2'), 'x')
    await settle()
    stop()
    page.says('t', 'b')
    page.asks('v', message('u3'), 'y')
    expect(page.network.socket.commands('detach')).toEqual([])
    page.ends_('t')
    await settle()
    expect(page.chat.answers).toEqual(['u1 a b'])
    expect(page.network.socket.commands('detach')).toHaveLength(1)
  })

  test('is left alone on a transport that is closed: an effect that throws would take the page with it', () => {
    const page = new Page()
    page.transport.close()
    observe(page.chat, page.transport)()
    expect(page.network.sockets).toEqual([])
  })

  test('ended with nothing to show leaves at once', () => {
    const page = new Page()
    page.observed()()
    expect(page.network.socket.commands('detach')).toHaveLength(1)
  })
})
