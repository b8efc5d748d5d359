/**
 * Keeps one carrier open as long as it is needed: the shell round the pure `connection-state`, with its sockets, its
 * timers and the page's events. It knows nothing of sessions.
 */
import type { Carrier, CarrierEvents, Endpoint } from './carriers/carrier.js'
import { EventStreamCarrier } from './carriers/event-stream.js'
import { LongPollCarrier } from './carriers/long-poll.js'
import { WebSocketCarrier } from './carriers/websocket.js'
import {
  type Closing,
  type ConnectionState,
  closed,
  initialState,
  open,
  proven,
  rest,
  wake,
} from './connection-state.js'
import { ClosedError } from './errors.js'
import { rememberCarrier, rememberedCarrier, watchPage } from './page.js'
import type { AttachCommand, CarrierName, Command, Said } from './protocol.js'

const CARRIERS = { websocket: WebSocketCarrier, sse: EventStreamCarrier, 'long-poll': LongPollCarrier }
const MAX_REPROBE_DOUBLINGS = 10

/** What whoever uses the connector is told. */
export interface ConnectorEvents {
  /** Commands may be given; nothing of what was given before is known to have arrived. */
  ready(): void
  said(said: Said, size: number): void
  /** The carrier is gone, and what was given and not answered with it. */
  lost(): void
  /** Attempts have failed for `giveUpMs`; they go on as long as they are needed. */
  gaveUp(): void
  /** It will not be open again. */
  failed(error: ClosedError): void
  /** The state may have changed. */
  changed(): void
  /** Something to attach to, for trying whether streams pass. */
  sample(): AttachCommand | undefined
}

export class Connector {
  readonly #carriers: readonly CarrierName[]
  readonly #makeEndpoint: () => Endpoint
  readonly #events: ConnectorEvents
  #endpoint: Endpoint | undefined
  #state: ConnectionState
  #carrier: Carrier | undefined
  #isReady = false
  /** A better carrier, being tried beside the one in use. */
  #candidate: Carrier | undefined
  readonly #worked = new Set<CarrierName>()
  #reprobes = 0
  #downSince = 0
  #stayUntil = 0
  #attempt: ReturnType<typeof setTimeout> | undefined
  #reprobe: ReturnType<typeof setTimeout> | undefined
  #leaving: ReturnType<typeof setTimeout> | undefined
  #leavesAt = 0
  #unwatch: (() => void) | undefined

  /** @param endpoint - Asked for when it is needed first: on a server there is no page. */
  constructor(carriers: readonly CarrierName[], endpoint: () => Endpoint, events: ConnectorEvents) {
    this.#carriers = carriers
    this.#makeEndpoint = endpoint
    this.#events = events
    this.#state = initialState(carriers[0] as CarrierName)
  }

  get state(): ConnectionState {
    return this.#state
  }

  /** Whether commands may be given now. */
  get isReady(): boolean {
    return this.#isReady
  }

  /** Whether a `send` attaches its sender. */
  get attachesSender(): boolean {
    return this.#carrier?.attachesSender ?? false
  }

  command(command: Command): void {
    this.#carrier?.command(command)
  }

  /** There is something to be connected for. */
  need(): void {
    if (this.#state.phase !== 'idle') return
    if (!this.#endpoint) {
      this.#endpoint = this.#makeEndpoint()
      this.#state = initialState(rememberedCarrier(this.#endpoint.base, this.#carriers))
    }
    this.#unwatch ??= watchPage(() => this.wake())
    this.#downSince = performance.now()
    this.#become(open(this.#state))
  }

  /** There is nothing to be connected for. */
  rest(): void {
    this.#become(rest(this.#state))
  }

  /** The page woke up, or its network changed: try now, and check what is open. */
  wake(): void {
    this.#downSince = performance.now()
    this.#reprobes = 0
    // One that is being opened has a deadline of its own.
    if (this.#state.phase === 'open') this.#carrier?.probe()
    this.#become(wake(this.#state))
  }

  close(): void {
    this.#become({ ...this.#state, phase: 'closed' })
  }

  #become(state: ConnectionState): void {
    const before = this.#state
    this.#state = state
    const isOther = before.phase !== state.phase || before.carrier !== state.carrier
    if (isOther && state.phase !== 'open') this.#drop()
    if (isOther && state.phase === 'opening') this.#open(state.carrier)
    if (isOther && state.phase === 'waiting') {
      const wait = Math.max(0, state.until - performance.now())
      this.#attempt = setTimeout(() => this.#become(open(this.#state)), wait)
    }
    if (state.phase === 'closed' || state.phase === 'idle') {
      this.#unwatch?.()
      this.#unwatch = undefined
    }
    this.#events.changed()
  }

  #open(name: CarrierName): void {
    try {
      this.#carrier = this.#make(name)
    } catch {
      // No such thing here, or a URL that it cannot take: the next one may.
      queueMicrotask(() => this.#closed({ timedOut: true }))
    }
  }

  #make(name: CarrierName): Carrier {
    let isReady = false
    const isCurrent = () => this.#carrier === carrier
    const events: CarrierEvents = {
      ready: () => {
        isReady = true
        if (isCurrent()) this.#ready()
      },
      proven: () => {
        if (isCurrent()) return this.#proven()
        this.#adopt(carrier)
        if (isReady) this.#ready()
      },
      said: (said, size) => isCurrent() && this.#said(said, size),
      closed: (closing) => (isCurrent() ? this.#closed(closing) : this.#candidateClosed()),
    }
    const carrier: Carrier = new CARRIERS[name](this.#endpoint as Endpoint, events)
    return carrier
  }

  #ready(): void {
    this.#isReady = true
    this.#events.ready()
  }

  #proven(): void {
    this.#worked.add(this.#state.carrier)
    rememberCarrier((this.#endpoint as Endpoint).base, this.#state.carrier)
    this.#become(proven(this.#state))
    this.#reprobeLater()
  }

  #said(said: Said, size: number): void {
    // docs/protocol.md: a greeting alone proves nothing, so who is closed after each backs off as well.
    const isGreeting = said.type === 'hello' || said.type === 'heartbeat'
    if (this.#state.failures && !isGreeting) this.#state = { ...this.#state, failures: 0 }
    // Until then the stopping node serves as before.
    if (said.type === 'goaway') return this.#leaveIn(said.after)
    const now = performance.now()
    if (said.type === 'error' && said.code === 'draining' && now >= this.#stayUntil) {
      // Another node takes what this one refuses. Where there is none, one is looked for only now and then.
      this.#stayUntil = now + (this.#endpoint as Endpoint).timing.backoffMaxMs
      this.#leaveIn(0)
    }
    this.#events.said(said, size)
  }

  /** At the earlier moment, if there is one already: a refusal and a goaway may come together. */
  #leaveIn(milliseconds: number): void {
    const at = performance.now() + milliseconds
    if (this.#leaving !== undefined && at >= this.#leavesAt) return
    clearTimeout(this.#leaving)
    this.#leavesAt = at
    this.#leaving = setTimeout(() => this.#closed({ after: 0 }), milliseconds)
  }

  #closed(closing: Closing): void {
    const { timing } = this.#endpoint as Endpoint
    const now = performance.now()
    if (this.#state.phase === 'open' && !this.#state.failures) this.#downSince = now
    const state = closed(this.#state, closing, this.#carriers, timing, now, Math.random())
    this.#drop()
    this.#become(state)
    if (state.phase === 'closed') {
      const why = state.reason || `its code was ${state.code}`
      this.#events.failed(
        new ClosedError(`unable to stay connected; the gateway closed for good: ${why}`, state.code),
      )
    } else if (now - this.#downSince >= timing.giveUpMs && state.failures > this.#carriers.length) {
      // At least a whole round of attempts, so that a laptop that slept for hours has tried before.
      this.#downSince = now // what is asked for from now on has as long again
      this.#events.gaveUp()
    }
  }

  /** Whatever this carrier still has to say is not heard. */
  #drop(): void {
    const carrier = this.#carrier
    this.#carrier = undefined
    this.#isReady = false
    clearTimeout(this.#attempt)
    clearTimeout(this.#leaving)
    this.#leaving = undefined
    clearTimeout(this.#reprobe)
    this.#candidate?.close()
    this.#candidate = undefined
    if (!carrier) return
    carrier.close()
    this.#events.lost()
  }

  // -- a better carrier, tried beside the one in use

  #reprobeLater(): void {
    clearTimeout(this.#reprobe)
    const better = this.#carriers.slice(0, this.#carriers.indexOf(this.#state.carrier))
    if (!better.length || this.#state.phase !== 'open') return
    const { reprobeMs, reprobeSoonMs } = (this.#endpoint as Endpoint).timing
    const base = better.some((name) => this.#worked.has(name)) ? reprobeSoonMs : reprobeMs
    const wait = base * 2 ** Math.min(this.#reprobes, MAX_REPROBE_DOUBLINGS)
    const name = better[this.#reprobes % better.length] as CarrierName
    this.#reprobe = setTimeout(() => this.#tryBetter(name), wait)
  }

  #tryBetter(name: CarrierName): void {
    // Only what was tried makes the next one wait longer: a stream that is cut now and then comes by here as well.
    this.#reprobes += 1
    const sample = name === 'websocket' ? undefined : this.#events.sample()
    if (name !== 'websocket' && !sample) return this.#reprobeLater()
    try {
      this.#candidate = this.#make(name)
    } catch {
      return this.#reprobeLater() // there is no such thing here, as was found before
    }
    if (sample) this.#candidate.command(sample)
  }

  /** It works: change over. What is under way is had again, from the last cursors. */
  #adopt(carrier: Carrier): void {
    if (this.#candidate !== carrier) return
    this.#candidate = undefined
    this.#drop()
    this.#carrier = carrier
    this.#reprobes = 0
    this.#state = proven(this.#state, carrier.name)
    this.#proven()
  }

  #candidateClosed(): void {
    this.#candidate = undefined
    if (this.#state.phase === 'open') this.#reprobeLater()
  }
}
