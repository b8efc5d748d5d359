/**
 * GatewayConnection: sessions on a connection that is made, lost and made again below them.
 *
 * It is what the transport stands on, and what a page without the AI SDK uses by itself.
 */
import { Commands } from './commands.js'
import { Connector } from './connector.js'
import { endpointOf, type GatewayConnectionOptions } from './endpoint.js'
import { ClosedError, networkError, RefusedError, tell } from './errors.js'
import { type Begin, type Place, SessionFeed, type SessionListener } from './feed.js'
import {
  type Accepted,
  type AttachCommand,
  type Attached,
  type CancelCommand,
  type CancelledTurn,
  type CarrierName,
  type From,
  isRecord,
  mintId,
  type Overlap,
  type Refused,
  type ResyncReason,
  type Said,
  type SendCommand,
  type SessionRecord,
} from './protocol.js'
import { DEFAULT_TIMING, type Timing } from './timing.js'

/**
 * `idle`: there is nothing to be connected for. `catching-up`: connected, and behind. `offline`: attempts fail, or the
 * page has no network; they go on. `closed`: for good, by `close()` or by the gateway.
 */
export type ConnectionPhase = 'idle' | 'connecting' | 'catching-up' | 'live' | 'offline' | 'closed'

/** An immutable snapshot. */
export interface ConnectionStatus {
  readonly state: ConnectionPhase
  /** The one in use, or being tried. */
  readonly carrier: CarrierName
  /** Why it is `closed`, if it was not asked to. */
  readonly error?: Error
}

export interface SendRequest {
  /** Names the turn for ever. Default: a random one. */
  readonly turn?: string
  /** What the backend gets; its session field is put in where it is missing. */
  readonly body: object
  /** One of the gateway's chat paths. Default: its first. */
  readonly path?: string
  readonly overlap?: Overlap
  /** For the backend; the gateway hands on those on its list. */
  readonly headers?: Readonly<Record<string, string>>
}

/** Where an attach begins. Default: from the first record kept. */
export interface AttachOptions {
  /** `running`: from the oldest turn that runs, else the newest that ended unread, else only what comes. */
  readonly from?: From
  /** The cursor of the last record had; it wins over `from`. */
  readonly after?: string
}

const ALL_CARRIERS: readonly CarrierName[] = ['websocket', 'sse', 'long-poll']

export class GatewayConnection {
  readonly timing: Timing
  readonly #connector: Connector
  readonly #commands: Commands
  readonly #feeds = new Map<string, SessionFeed>()
  readonly #attaches = new Map<string, { feed: SessionFeed; place: Place }>()
  readonly #subscribers = new Set<() => void>()
  #client: string | undefined
  #status: ConnectionStatus
  #idle: ReturnType<typeof setTimeout> | undefined

  constructor(options: GatewayConnectionOptions = {}) {
    this.#client = options.client
    this.timing = { ...DEFAULT_TIMING, ...options.timing }
    this.#commands = new Commands((command) => this.#give(command), this.timing)
    this.#connector = new Connector(
      options.carriers?.length ? options.carriers : ALL_CARRIERS,
      () => endpointOf(options, this.client, this.timing),
      {
        ready: () => this.#ready(),
        said: (said, size) => this.#said(said, size),
        lost: () => this.#lost(),
        gaveUp: () => this.#gaveUp(),
        failed: (error) => this.#failed(error),
        changed: () => this.#publish(),
        sample: () => this.#sample(),
      },
    )
    this.#status = { state: 'idle', carrier: this.#connector.state.carrier }
  }

  /** This client's id, as others see it in `by.client`. Not drawn before it is needed: a Worker's global scope has no dice. */
  get client(): string {
    this.#client ??= `c-${mintId()}`
    return this.#client
  }

  /** An immutable snapshot; a new one only when something in it has changed. */
  get status(): ConnectionStatus {
    return this.#status
  }

  /** Be told when `status` has changed. Returns the end of it. */
  subscribe(listener: () => void): () => void {
    this.#subscribers.add(listener)
    return () => this.#subscribers.delete(listener)
  }

  /** The offset of the last record told of a session that is attached, and the newest one known. */
  position(session: string): { offset: number; last: number } {
    const { offset, last } = this.#feeds.get(session) ?? { offset: 0, last: 0 }
    return { offset, last }
  }

  /** Receive a session's records, whatever happens to the connection. Returns the end of it. */
  attach(
    session: string,
    listener: SessionListener,
    { from = 'start', after }: AttachOptions = {},
  ): () => void {
    return this.listen(session, listener, after === undefined ? { from } : { after }, true)
  }

  /**
   * As `attach`; also from the beginning of a turn that is about to be sent.
   *
   * @internal
   * @param isPatient - False: it fails when reconnecting is given up (`timing.giveUpMs`).
   */
  listen(session: string, listener: SessionListener, begin: Begin, isPatient: boolean): () => void {
    this.#need()
    const feed = this.#feeds.get(session) ?? new SessionFeed(session)
    this.#feeds.set(session, feed)
    feed.add(listener, begin, isPatient)
    this.#place(feed)
    return () => {
      feed.remove(listener)
      this.#leaveIfEmpty(feed)
    }
  }

  /**
   * Ask for a turn. Sent again, under the same name, until it is answered.
   *
   * @returns When it is journalled: from then on nothing that happens here can lose it.
   * @throws RefusedError - Nothing was sent to the backend by it.
   * @throws TypeError - Reconnecting was given up; the turn may or may not have begun.
   */
  async send(session: string, request: SendRequest): Promise<Accepted> {
    this.#need()
    return this.#commands.send({ session, ...request, turn: request.turn ?? mintId() })
  }

  /**
   * End a turn, or all that run, those included that were asked for here and are not accepted yet.
   *
   * @returns What became of each, when the connections to the backend are closed.
   * @throws RefusedError - It could not be done yet.
   */
  async cancel(session: string, turn?: string): Promise<CancelledTurn[]> {
    this.#need()
    // Those on their way by name: their cancel may come before them, and is remembered then.
    const named = turn === undefined ? [...this.#commands.unanswered(session), undefined] : [turn]
    const answers = await Promise.all(named.map((name) => this.#commands.cancel(session, name)))
    return [...new Map(answers.flat().map((answer) => [answer.turn, answer])).values()]
  }

  /** Try now, whatever the backoff says; check what is open. */
  reconnect(): void {
    this.#connector.wake()
  }

  /** End it for good. Nothing is cancelled by it. */
  close(): void {
    this.#connector.close()
    this.#end(new ClosedError('unable to go on; it was closed'))
  }

  // -- what the connector tells

  #ready(): void {
    for (const feed of this.#feeds.values()) this.#place(feed)
    this.#commands.giveAll()
    this.#restIfIdle()
  }

  #lost(): void {
    this.#attaches.clear()
    this.#commands.disconnected()
    for (const feed of this.#feeds.values()) feed.disconnected()
  }

  #gaveUp(): void {
    const error = networkError()
    this.#commands.fail(error)
    for (const feed of this.#feeds.values()) {
      feed.fail(error, 'impatient')
      this.#leaveIfEmpty(feed)
    }
    if (!this.#feeds.size) this.#connector.rest()
  }

  #failed(error: ClosedError): void {
    this.#status = { ...this.#status, state: 'closed', error }
    this.#end(error)
    this.#tell()
  }

  #end(error: Error): void {
    this.#commands.fail(error)
    for (const feed of this.#feeds.values()) {
      clearTimeout(feed.retry)
      feed.fail(error, 'all')
    }
    this.#feeds.clear()
    clearTimeout(this.#idle)
  }

  #said(said: Said, size: number): void {
    if (isRecord(said)) this.#record(said, size)
    else if (said.type === 'attached') this.#attached(said)
    else if (said.type === 'accepted') this.#accepted(said)
    else if (said.type === 'cancelled') this.#commands.answered(said)
    else if (said.type === 'error') this.#refused(said)
    else if (said.type === 'resync') this.#resync(said.session, said.reason)
    else return // hello, heartbeat, ok, pong, and what later versions may add
    this.#restIfIdle()
    this.#publish()
  }

  #record(record: SessionRecord, size: number): void {
    const feed = this.#feeds.get(record.session)
    if (!feed) return
    if (record.type === 'turn-start') this.#commands.began(record.session, record.turn, record.cursor)
    const isNext = feed.record(record, size)
    if (!isNext && feed.attaching === undefined) this.#attachAt(feed, { after: feed.cursor as string })
  }

  #attached(attached: Attached): void {
    const asked = this.#attaches.get(attached.id ?? '')
    this.#attaches.delete(attached.id ?? '')
    // A trial of a better carrier attaches to a session, which may have been left meanwhile.
    if (!this.#feeds.has(attached.session))
      this.#connector.command({ type: 'detach', id: mintId(), session: attached.session })
    if (!asked || asked.feed.attaching !== attached.id) return
    const again = asked.feed.attached(attached, asked.place)
    if (again) this.#attachAt(asked.feed, again)
    else this.#place(asked.feed)
  }

  /** Its records follow: by themselves on a socket; on the other carriers when they are asked for. */
  #accepted(accepted: Accepted): void {
    this.#commands.answered(accepted)
    const feed = this.#feeds.get(accepted.session)
    if (!feed) return
    if (feed.isAttached || feed.attaching !== undefined) {
      if (accepted.duplicate) feed.begin(accepted.turn, accepted.cursor)
    } else if (this.#connector.attachesSender) return feed.follow(accepted.cursor)
    else feed.cursor ??= accepted.cursor
    this.#place(feed)
  }

  #refused(refused: Refused): void {
    const asked = this.#attaches.get(refused.id ?? '')
    if (!asked) {
      this.#commands.answered(refused)
      return
    }
    this.#attaches.delete(refused.id ?? '')
    const { feed } = asked
    if (feed.attaching !== refused.id) return
    feed.attaching = undefined
    if (refused.retryable) {
      // Jittered, since what one client is refused, all are.
      const wait = Math.min((refused.retryAfter ?? 1) * 1_000, this.timing.backoffMaxMs)
      feed.retry = setTimeout(() => this.#place(feed), wait * (0.5 + Math.random() / 2))
    } else {
      feed.fail(new RefusedError(refused), 'all')
      this.#leaveIfEmpty(feed)
    }
  }

  #resync(session: string, reason: ResyncReason): void {
    const feed = this.#feeds.get(session)
    if (!feed) return
    feed.lost(reason)
    this.#place(feed)
  }

  // -- places

  /** Attach where it is wanted, if it is. */
  #place(feed: SessionFeed): void {
    const isOurs = this.#feeds.get(feed.session) === feed
    if (!this.#connector.isReady || feed.attaching !== undefined || !isOurs) return
    const place = feed.wanted()
    if (place) this.#attachAt(feed, place)
  }

  #attachAt(feed: SessionFeed, place: Place): void {
    const id = mintId()
    feed.attaching = id
    this.#attaches.set(id, { feed, place })
    this.#connector.command({ type: 'attach', id, session: feed.session, ...place })
    this.#publish()
  }

  #leaveIfEmpty(feed: SessionFeed): void {
    if (!feed.isEmpty || this.#feeds.get(feed.session) !== feed) return
    this.#feeds.delete(feed.session)
    clearTimeout(feed.retry)
    if (this.#connector.isReady && (feed.isAttached || feed.attaching !== undefined)) {
      this.#connector.command({ type: 'detach', id: mintId(), session: feed.session })
    }
    this.#restIfIdle()
    this.#publish()
  }

  #give(command: SendCommand | CancelCommand): boolean {
    const { isReady } = this.#connector
    if (isReady) this.#connector.command(command)
    return isReady
  }

  /** Something to attach to, for trying whether streams pass. */
  #sample(): AttachCommand | undefined {
    for (const { session, cursor: after } of this.#feeds.values()) {
      if (after !== undefined) return { type: 'attach', id: mintId(), session, after }
    }
    return undefined
  }

  // -- whether it is needed, and what a UI shows of it

  #need(): void {
    if (this.#status.state === 'closed')
      throw this.#status.error ?? new ClosedError('unable to go on; it was closed')
    clearTimeout(this.#idle)
    this.#idle = undefined
    this.#connector.need()
  }

  #restIfIdle(): void {
    if (this.#feeds.size || !this.#commands.isEmpty || this.#idle !== undefined) return
    this.#idle = setTimeout(() => {
      this.#idle = undefined
      if (!this.#feeds.size && this.#commands.isEmpty) this.#connector.rest()
    }, this.timing.idleMs)
  }

  #publish(): void {
    const { carrier } = this.#connector.state
    const state = this.#phase()
    if (this.#status.state === state && this.#status.carrier === carrier) return
    this.#status = { ...this.#status, state, carrier }
    this.#tell()
  }

  #tell(): void {
    for (const subscriber of [...this.#subscribers]) tell(subscriber)
  }

  #phase(): ConnectionPhase {
    const { phase, failures } = this.#connector.state
    if (phase === 'idle' || phase === 'closed') return phase
    if (phase !== 'open')
      return failures > 1 || globalThis.navigator?.onLine === false ? 'offline' : 'connecting'
    return [...this.#feeds.values()].every((feed) => feed.isCaughtUp) ? 'live' : 'catching-up'
  }
}
