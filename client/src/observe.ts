/**
 * Shows on one `Chat` what others do: other tabs, other devices, other people, and this page before its reload.
 *
 * A turn that somebody else has started appears with its question, and its answer streams through the SDK's own
 * pipeline (`resumeStream`), so that status, `onFinish`, `onData` and `stop` are what they are for a turn of one's own.
 * One turn after the other, and none while the chat is busy with its own: what comes meanwhile waits.
 */
import type { UIMessage } from 'ai'
import type { SessionListener } from './feed.js'
import { type Attached, isRunning, type SessionRecord, type TurnStart } from './protocol.js'
import type { GatewayChatTransport } from './transport.js'
import type { TurnReader } from './turn-reader.js'

/** What `observe` needs of a chat: the `Chat` of any framework has it. */
export interface ObservableChat<M extends UIMessage = UIMessage> {
  readonly id: string
  messages: M[]
  readonly status: 'submitted' | 'streaming' | 'ready' | 'error'
  resumeStream(): Promise<void>
}

/** How often a busy chat is looked at: the SDK announces to frameworks only that it is not any more. */
const LOOK_MS = 20

/** Turns that a chat has been shown, by chat: who observes it anew must not show them again. */
const shownTurns = new WeakMap<object, Set<string>>()

/** Turns remembered per chat. */
const MAX_SHOWN = 1_000

/**
 * Show on `chat` what others do, from now on; and what ran when the page was loaded, so leave `resume` off.
 *
 * @returns The end of it. What is being shown then is shown to its end.
 */
export function observe<M extends UIMessage>(
  chat: ObservableChat<M>,
  transport: GatewayChatTransport<M>,
): () => void {
  // Nothing will come any more, which its `connection` tells; an effect that throws would take the page with it.
  if (transport.connection.state === 'closed') return () => {}
  const observer = new Observer(chat, transport)
  return () => observer.stop()
}

class Observer<M extends UIMessage> implements SessionListener {
  readonly #chat: ObservableChat<M>
  readonly #transport: GatewayChatTransport<M>
  readonly #shown: Set<string>
  /** Sends of this page that are this chat's own: those after it was observed, and the one it is busy with. */
  readonly #ownSince: number
  readonly #readers = new Map<string, TurnReader>()
  #queue: { start: TurnStart; reader: TurnReader }[] = []
  #isShowing = false
  #isStopped = false
  /** Those that ran when this was attached. */
  #running: ReadonlySet<string> = new Set()
  /** The journal is being told from its beginning, and much of it stands in the chat. */
  #isToldAgain = false
  readonly #detach: (() => void)[]

  constructor(chat: ObservableChat<M>, transport: GatewayChatTransport<M>) {
    this.#chat = chat
    this.#transport = transport
    this.#shown = shownTurns.get(chat) ?? new Set()
    shownTurns.set(chat, this.#shown)
    this.#ownSince = isBusy(chat) ? 0 : transport.sends
    this.#detach = [
      transport.gateway.attach(chat.id, this, { from: 'running' }),
      transport.subscribe(() => this.#resumeBroken()),
    ]
  }

  attached(attached: Attached): void {
    this.#running = new Set(attached.turns.filter(isRunning).map(({ turn }) => turn))
  }

  record(record: SessionRecord, size: number): void {
    if (record.type === 'turn-start') this.#started(record)
    this.#readers.get(record.turn)?.record(record, size)
  }

  reset(): void {
    this.#isToldAgain = true
    for (const reader of this.#readers.values()) reader.reset()
  }

  caughtUp(): void {
    this.#isToldAgain = false
    for (const reader of this.#readers.values()) reader.caughtUp()
  }

  failed(error: Error): void {
    for (const reader of this.#readers.values()) reader.failed(error)
  }

  stop(): void {
    this.#isStopped = true
    for (const { start, reader } of this.#queue) {
      // Whoever observes the chat next shows it.
      this.#shown.delete(start.turn)
      reader.leave()
    }
    this.#queue = []
    this.#leaveIfDone()
  }

  #started(start: TurnStart): void {
    const { turn } = start
    const own = this.#transport.sentAs(this.#chat.id, turn)
    const isOwn = own !== undefined && own > this.#ownSince
    if (this.#isStopped || isOwn || this.#shown.has(turn) || this.#isOld(start)) return
    this.#remember(turn)
    const reader = this.#transport.makeReader(this.#chat.id, turn, () => {
      this.#readers.delete(turn)
      this.#leaveIfDone()
    })
    this.#readers.set(turn, reader)
    this.#queue.push({ start, reader })
    void this.#show()
  }

  async #show(): Promise<void> {
    if (this.#isShowing) return
    this.#isShowing = true
    try {
      for (let next = await this.#next(); next; next = await this.#next()) {
        this.#chat.messages = withQuestion(this.#chat.messages, next.start)
        this.#transport.claim(next.reader)
        // It tells its errors by the chat's own `status` and `onError`.
        await this.#chat.resumeStream()
      }
    } finally {
      this.#isShowing = false
      // One may have come in the very moment, or a chat's own callback has thrown.
      if (this.#queue.length > 0) void this.#show()
    }
  }

  /** Told again after a reset, and shown long ago, by this page or by the one before its reload. */
  #isOld({ turn, messages }: TurnStart): boolean {
    if (!this.#isToldAgain || this.#running.has(turn)) return false
    const id = (messages.at(-1) as M | undefined)?.id
    return this.#chat.messages.some((message) => message.id === id)
  }

  /** The stream of a turn of its own failed when reconnecting was given up, and there is a connection again. */
  #resumeBroken(): void {
    const { id, status } = this.#chat
    const { state } = this.#transport.connection
    if (status === 'error' && this.#transport.isBroken(id) && (state === 'live' || state === 'catching-up')) {
      void this.#chat.resumeStream()
    }
  }

  /** The next turn, once the chat has time for it. */
  async #next(): Promise<{ start: TurnStart; reader: TurnReader } | undefined> {
    while (this.#queue.length > 0 && isBusy(this.#chat))
      await new Promise((resolve) => setTimeout(resolve, LOOK_MS))
    return this.#queue.shift()
  }

  #remember(turn: string): void {
    this.#shown.add(turn)
    const [oldest] = this.#shown
    if (this.#shown.size > MAX_SHOWN && oldest !== undefined) this.#shown.delete(oldest)
  }

  #leaveIfDone(): void {
    if (!this.#isStopped || this.#readers.size > 0) return
    for (const detach of this.#detach) detach()
  }
}

function isBusy({ status }: ObservableChat): boolean {
  return status === 'submitted' || status === 'streaming'
}

/**
 * The messages as they were when the turn was sent: up to its last message, as that was sent.
 *
 * A new question comes at the end. One that is known was edited, is answered again, or its answer was cut off by a
 * reload: what stands behind it goes. An assistant's is a continuation, with the results that the sender put in.
 */
export function withQuestion<M extends UIMessage>(
  messages: readonly M[],
  { messages: sent, turn }: TurnStart,
): M[] {
  const said = sent.at(-1) as Partial<M> | undefined
  if (!said || typeof said !== 'object') return [...messages]
  // Whoever sends without the SDK may leave out what each page needs to show a message.
  const last = { ...said, id: said.id ?? turn, parts: said.parts ?? [] } as unknown as M
  const known = messages.findIndex(({ id }) => id === last.id)
  return [...(known === -1 ? messages : messages.slice(0, known)), last]
}
