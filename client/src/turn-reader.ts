/** One turn's records to the one `ReadableStream` that the SDK reads, whatever happens to the connection below. */
import type { UIMessageChunk } from 'ai'
import { abortError, type TurnEnd, TurnError } from './errors.js'
import type { SessionListener } from './feed.js'
import type { Chunk, SessionRecord, TurnEndRecord } from './protocol.js'

/**
 * The most that may wait to be read: as much as one turn holds (GATEWAY_MAX_TURN's default is 16 MiB). A page that
 * lets more pile up has its stream fail; a WebSocket gives it no way to slow the gateway down.
 */
const MAX_WAITING_SIZE = 32 * 1024 * 1024

/** Chunks that are read before they are let go of. */
const MANY = 1_000

export interface TurnReaderOptions {
  readonly chatId: string
  readonly turn: string
  /** Chunks of the turn that were read before, by a stream that failed. */
  readonly skip?: number
  readonly onEnd?: ((end: TurnEnd) => void) | undefined
  readonly onFailed?: ((error: Error, reader: TurnReader) => void) | undefined
  /** Nobody reads any more: it ended, failed, or was cancelled by its reader. Once. */
  readonly onLeft?: (() => void) | undefined
}

export class TurnReader implements SessionListener {
  readonly chatId: string
  readonly turn: string
  /** Fails with an AbortError when the turn was cancelled, and with a TurnError when it ended badly. */
  readonly stream: ReadableStream<UIMessageChunk>
  /** Whether the gateway knows of the turn; what is not accepted yet cannot be missing. */
  isAccepted = true
  readonly #options: TurnReaderOptions
  #controller: ReadableStreamDefaultController<UIMessageChunk> | undefined
  #waiting: { chunk: UIMessageChunk; size: number }[] = []
  /** How many of the first are read. */
  #read = 0
  #waitingSize = 0
  #isPulled = false
  #ending: { error?: Error } | undefined
  #isLeft = false
  /** The backend's own `error` chunk was read; and nothing after it will be. */
  #isFailing = false
  #isUnread = false
  /** Chunks of the turn told since its `turn-start`, and the most that were ever taken in. */
  #told = 0
  #taken: number
  #isMissing = false

  constructor(options: TurnReaderOptions) {
    this.chatId = options.chatId
    this.turn = options.turn
    this.#options = options
    this.#taken = options.skip ?? 0
    // Without a queue of its own: an error would throw away what is in it, and what came before must be shown.
    const source: UnderlyingDefaultSource<UIMessageChunk> = {
      start: (controller) => {
        this.#controller = controller
      },
      pull: () => {
        this.#isPulled = true
        this.#flush()
      },
      // The SDK reads no further than an `error` chunk; how the turn ends is told all the same.
      cancel: () => (this.#isFailing ? this.#unread() : this.leave()),
    }
    this.stream = new ReadableStream(source, { highWaterMark: 0 })
  }

  /** Chunks of the turn that were taken in. */
  get taken(): number {
    return this.#taken
  }

  record(record: SessionRecord, size: number): void {
    if (record.turn !== this.turn || this.#ending) return
    if (record.type === 'turn-start') {
      this.isAccepted = true
      this.#isMissing = false
      this.#told = 0
    } else if (this.#isMissing)
      return // the rest of a turn whose beginning is not kept: nobody can tell how much is missing
    else if (record.type === 'chunk') this.#chunk(record, size)
    else this.#ended(record)
  }

  /** What follows is told from the start once more; it is the same, so as many chunks are skipped. */
  reset(): void {
    this.#told = 0
    this.#isMissing = true
  }

  caughtUp(): void {
    if (!this.#isMissing || !this.isAccepted) return
    const message = 'unable to go on with the answer; its records are not kept any more'
    const error = { code: 'journal-lost', message }
    this.failed(new TurnError({ chatId: this.chatId, turn: this.turn, reason: 'interrupted', error }))
  }

  /** Whether its end is known, read or not. */
  get isOver(): boolean {
    return this.#ending !== undefined
  }

  failed(error: Error): void {
    if (this.#ending) return
    this.#end({ error })
    if (!this.#isUnread) this.#options.onFailed?.(error, this)
  }

  /** Stop reading: a detach. What runs, runs on. */
  leave(): void {
    this.#waiting = []
    this.#ending ??= {}
    this.#leftOnce()
  }

  /** As `leave`, when it is the reader's own doing that must be told to the stream as well. */
  abort(): void {
    const isOver = this.#isLeft
    this.leave()
    if (!isOver) this.#controller?.error(abortError('the stream was aborted by its reader'))
  }

  #chunk(record: Chunk, size: number): void {
    this.#told += 1
    if (this.#told <= this.#taken) return
    this.#taken = this.#told
    const { data } = record
    // Events of other kinds may stand in a backend's stream; the SDK's own parser leaves them out too.
    if (typeof data !== 'object' || data === null || !('type' in data) || this.#isUnread) return
    this.#waiting.push({ chunk: data as UIMessageChunk, size })
    this.#waitingSize += size
    if (this.#waitingSize <= MAX_WAITING_SIZE) return this.#flush()
    this.#waiting = []
    this.failed(
      new Error(`unable to keep the answer; more than ${MAX_WAITING_SIZE} characters were not read`),
    )
  }

  #ended({ reason, by, error }: TurnEndRecord): void {
    const end: TurnEnd = {
      chatId: this.chatId,
      turn: this.turn,
      reason,
      ...(by && { by }),
      ...(error && { error }),
    }
    if (reason === 'complete') this.#end({})
    else if (reason === 'cancelled') this.#end({ error: abortError('the turn was cancelled') })
    // The backend's own `error` chunk has told it; it stands before this in the stream.
    else if (error?.code === 'upstream-error') this.#end({})
    else this.#end({ error: new TurnError(end) })
    this.#options.onEnd?.(end)
  }

  #end(ending: { error?: Error }): void {
    if (this.#ending) return
    this.#ending = ending
    this.#flush()
  }

  #flush(): void {
    if (this.#isLeft || !this.#controller) return
    if (this.#isUnread) {
      if (this.#ending) this.#leftOnce()
      return
    }
    const next = this.#waiting[this.#read]
    if (next && this.#isPulled) {
      this.#read += 1
      // One by one, a long backlog would be moved up once for each of its chunks.
      if (this.#read === MANY) this.#waiting.splice(0, this.#read)
      this.#read %= MANY
      this.#waitingSize -= next.size
      this.#isPulled = false
      this.#isFailing = next.chunk.type === 'error'
      this.#controller.enqueue(next.chunk)
    } else if (!next && this.#ending) {
      if (this.#ending.error) this.#controller.error(this.#ending.error)
      else this.#controller.close()
      this.#leftOnce()
    }
  }

  #unread(): void {
    this.#isUnread = true
    this.#waiting = []
    this.#flush()
  }

  #leftOnce(): void {
    if (this.#isLeft) return
    this.#isLeft = true
    this.#options.onLeft?.()
  }
}
