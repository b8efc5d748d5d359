/** GatewayChatTransport: the AI SDK's `ChatTransport` on a gateway connection. */
import type { ChatTransport, UIMessage, UIMessageChunk } from 'ai'
import { type ConnectionStatus, GatewayConnection } from './connection.js'
import type { GatewayConnectionOptions } from './endpoint.js'
import { abortError, type TurnEnd, tell } from './errors.js'
import type { SessionListener } from './feed.js'
import { type Attached, type CancelledTurn, isRunning, mintId, type SessionRecord } from './protocol.js'
import { makeRequest, plainHeaders, type RequestOptions, resolve } from './request.js'
import { TurnReader } from './turn-reader.js'

type SendOptions<M extends UIMessage> = Parameters<ChatTransport<M>['sendMessages']>[0]
type ReconnectOptions<M extends UIMessage> = Parameters<ChatTransport<M>['reconnectToStream']>[0]

export interface GatewayChatTransportOptions<M extends UIMessage = UIMessage>
  extends Omit<GatewayConnectionOptions, 'request'>,
    RequestOptions<M> {
  /**
   * What an `abortSignal` means: `detach` (nothing ends; the default) or `cancel`. A Stop and an unmounted component
   * fire the same signal, so a Stop button calls `cancel()`, or the `stop()` of `useGatewayChat`.
   */
  readonly onAbort?: 'detach' | 'cancel' | undefined
  /** A turn that this page follows has ended, whoever started it. */
  readonly onTurnEnd?: ((end: TurnEnd) => void) | undefined
}

/** Turn ids that are remembered per chat; older ones cannot be running any more. */
const MAX_REMEMBERED = 1_000

/** One per page serves any number of chats, one `Chat` object for each chat id. */
export class GatewayChatTransport<M extends UIMessage = UIMessage> implements ChatTransport<M> {
  /** A resume tells the whole turn, from its first chunk. */
  readonly resumeStreamIsReplay = true
  /** Sessions, records and commands, without the SDK. */
  readonly gateway: GatewayConnection
  readonly #options: GatewayChatTransportOptions<M>
  readonly #sent = new Map<string, Map<string, number>>()
  #sends = 0
  /** By chat: how many streams it was given. */
  readonly #streams = new Map<string, number>()
  readonly #claims = new Map<string, TurnReader>()
  /** By chat: what was read of a turn whose stream failed when reconnecting was given up. */
  readonly #broken = new Map<string, { turn: string; taken: number }>()
  readonly #readers = new Set<TurnReader>()
  /** Sends whose request is being made: their headers or body are waited for. */
  readonly #preparing = new Set<{ readonly chatId: string; isCancelled: boolean }>()
  readonly #endListeners = new Set<(end: TurnEnd) => void>()

  constructor(options: GatewayChatTransportOptions<M> = {}) {
    this.#options = options
    this.gateway = new GatewayConnection({
      ...options,
      request: async () => ({
        headers: plainHeaders(await resolve(options.headers)),
        credentials: await resolve(options.credentials),
      }),
    })
  }

  /** This client's id, as others see it in `by.client`. */
  get client(): string {
    return this.gateway.client
  }

  /** An immutable snapshot, for a UI; with `subscribe`, what `useSyncExternalStore` asks for. */
  get connection(): ConnectionStatus {
    return this.gateway.status
  }

  readonly subscribe = (listener: () => void): (() => void) => this.gateway.subscribe(listener)

  /** Be told of every turn's end that this page follows. Returns the end of it. */
  onTurnEnd(listener: (end: TurnEnd) => void): () => void {
    this.#endListeners.add(listener)
    return () => this.#endListeners.delete(listener)
  }

  /** The offset of the last record had of a chat, and the newest one known. */
  position(chatId: string): { offset: number; last: number } {
    return this.gateway.position(chatId)
  }

  /** Try to connect now, whatever the backoff says. */
  reconnect(): void {
    this.gateway.reconnect()
  }

  /** End all connections. Nothing is cancelled by it. */
  readonly close = (): void => this.gateway.close()

  /**
   * Ask for a turn; called by the SDK.
   *
   * @returns When it is journalled: a stream that ends as the turn does, and outlives any connection.
   * @throws RefusedError - The gateway refused; the backend was not asked.
   */
  async sendMessages(options: SendOptions<M>): Promise<ReadableStream<UIMessageChunk>> {
    const { chatId, abortSignal } = options
    const turn = mintId()
    this.#remember(chatId, turn)
    this.#count(chatId)
    const preparing = { chatId, isCancelled: false }
    this.#preparing.add(preparing)
    const request = await makeRequest(this.#options, options).finally(() => this.#preparing.delete(preparing))
    abortSignal?.throwIfAborted()
    if (preparing.isCancelled) throw abortError('the turn was cancelled')
    const reader = this.#follow(chatId, turn)
    reader.isAccepted = false
    const accepted = this.gateway.send(chatId, { ...request, turn }).then(
      () => {
        reader.isAccepted = true
      },
      (error: unknown) => {
        reader.leave()
        throw error
      },
    )
    this.#leaveOnAbort(reader, abortSignal)
    await unlessAborted(accepted, abortSignal)
    return reader.stream
  }

  /**
   * The newest turn that runs, from its first chunk; else the newest that ended and that nobody has read; else null.
   * Called by the SDK when it resumes, and by `observe` for a turn that somebody else has started.
   */
  async reconnectToStream(options: ReconnectOptions<M>): Promise<ReadableStream<UIMessageChunk> | null> {
    const { chatId, abortSignal } = options
    const claimed = this.#claims.get(chatId)
    this.#claims.delete(chatId)
    const reader = claimed ?? (await this.#newest(chatId, abortSignal))
    if (!reader) return null
    this.#count(chatId)
    this.#leaveOnAbort(reader, abortSignal)
    return reader.stream
  }

  /**
   * End a turn of a chat, or all that run: those that other devices have started, and those that this one has just
   * asked for. Given again until it is answered, also across reconnects.
   *
   * @returns What became of each, when the backend's connections are closed.
   * @throws RefusedError - It could not be done yet.
   */
  async cancel(chatId: string, options: { readonly turn?: string } = {}): Promise<CancelledTurn[]> {
    const { turn } = options
    for (const one of this.#preparing) if (one.chatId === chatId) one.isCancelled ||= turn === undefined
    const followed = [...this.#readers].filter((reader) => reader.chatId === chatId && !reader.isOver)
    const { state } = this.connection
    if (turn !== undefined || !followed.length || state === 'live' || state === 'catching-up')
      return this.gateway.cancel(chatId, turn)
    // Heard later, "all" would end what others have begun meanwhile, and this page has never shown.
    const answers = await Promise.all(followed.map((reader) => this.gateway.cancel(chatId, reader.turn)))
    return answers.flat()
  }

  /**
   * Hand the next `reconnectToStream` of a chat this turn, and no other.
   *
   * @internal
   */
  claim(reader: TurnReader): void {
    this.#claims.set(reader.chatId, reader)
  }

  /**
   * When this transport sent a turn: 1, 2, 3 ...; undefined: somebody else did.
   *
   * @internal
   */
  sentAs(chatId: string, turn: string): number | undefined {
    return this.#sent.get(chatId)?.get(turn)
  }

  /**
   * Whether a resume would go on with a stream that failed when reconnecting was given up.
   *
   * @internal
   */
  isBroken(chatId: string): boolean {
    return this.#broken.has(chatId)
  }

  /** @internal */
  get sends(): number {
    return this.#sends
  }

  /**
   * How many streams a chat was given: whether what streams now is what streamed then.
   *
   * @internal
   */
  streams(chatId: string): number {
    return this.#streams.get(chatId) ?? 0
  }

  /**
   * A reader that tells its turn's end where this transport does.
   *
   * @internal
   */
  makeReader(chatId: string, turn: string, onLeft: () => void, skip = 0): TurnReader {
    const reader = new TurnReader({
      chatId,
      turn,
      skip,
      onEnd: (end) => this.#ended(end),
      onFailed: (error, { taken }) => error instanceof TypeError && this.#broken.set(chatId, { turn, taken }),
      onLeft: () => {
        this.#readers.delete(reader)
        onLeft()
      },
    })
    this.#readers.add(reader)
    return reader
  }

  /** From the turn's beginning, which is about to be. */
  #follow(chatId: string, turn: string): TurnReader {
    let detach: (() => void) | undefined
    const reader = this.makeReader(chatId, turn, () => detach?.())
    try {
      detach = this.gateway.listen(chatId, reader, { turn }, false)
    } catch (error) {
      reader.leave()
      throw error
    }
    return reader
  }

  /** The turn that a resume tells. */
  #newest(chatId: string, signal: AbortSignal | undefined): Promise<TurnReader | undefined> {
    const broken = this.#broken.get(chatId)
    this.#broken.delete(chatId)
    let reader: TurnReader | undefined
    let detach: (() => void) | undefined
    const found = new Promise<TurnReader | undefined>((found, failed) => {
      const listener: SessionListener = {
        attached: (attached) => {
          if (reader) return // told again after a reset: it is chosen, and goes on
          const turn = turnToResume(attached, broken?.turn)
          // Whoever read a part of it goes on after that part: the page still shows it.
          if (turn !== undefined)
            reader = this.makeReader(chatId, turn, () => detach?.(), turn === broken?.turn ? broken.taken : 0)
          found(reader)
        },
        record: (record: SessionRecord, size: number) => reader?.record(record, size),
        reset: () => reader?.reset(),
        caughtUp: () => reader?.caughtUp(),
        failed: (error) => (reader ? reader.failed(error) : failed(error)),
      }
      detach = this.gateway.listen(chatId, listener, { from: broken ? 'start' : 'running' }, false)
    })
    return unlessAborted(found, signal).finally(() => reader ?? detach?.())
  }

  #leaveOnAbort(reader: TurnReader, signal: AbortSignal | undefined): void {
    const abort = () => {
      if (this.#options.onAbort === 'cancel' && !reader.isOver) {
        // Nobody is left to be told; the turn's end tells all who follow it.
        this.gateway.cancel(reader.chatId, reader.turn).catch(() => {})
      }
      reader.abort()
    }
    if (signal?.aborted) abort()
    else signal?.addEventListener('abort', abort, { once: true })
  }

  #remember(chatId: string, turn: string): void {
    const sent = this.#sent.get(chatId) ?? new Map<string, number>()
    this.#sent.set(chatId, sent)
    this.#sends += 1
    sent.set(turn, this.#sends)
    const [oldest] = sent.keys()
    if (sent.size > MAX_REMEMBERED && oldest !== undefined) sent.delete(oldest)
  }

  #count(chatId: string): void {
    this.#streams.set(chatId, this.streams(chatId) + 1)
  }

  #ended(end: TurnEnd): void {
    this.#broken.delete(end.chatId)
    for (const listener of [this.#options.onTurnEnd, ...this.#endListeners]) tell(() => listener?.(end))
  }
}

/** The newest that runs, or that ended unread; or the very one that was being read. */
function turnToResume({ turns, offset }: Attached, broken: string | undefined): string | undefined {
  if (broken !== undefined && turns.some(({ turn }) => turn === broken)) return broken
  const told = turns.filter((turn) => turn.offset > offset)
  const running = told.filter(isRunning)
  // From the beginning everything is told, what was read long ago as well.
  return (running.at(-1) ?? (broken === undefined ? told.at(-1) : undefined))?.turn
}

async function unlessAborted<T>(work: Promise<T>, signal: AbortSignal | undefined): Promise<T> {
  if (!signal) return work
  return new Promise((resolve, reject) => {
    const abort = () => reject(abortError('the request was aborted'))
    if (signal.aborted) abort()
    signal.addEventListener('abort', abort, { once: true })
    work.then(resolve, reject).finally(() => signal.removeEventListener('abort', abort))
  })
}
