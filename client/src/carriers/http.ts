/** What the two carriers over plain HTTP share: commands are POSTed, refusals are read. */
import type { Closing } from '../connection-state.js'
import type { AttachCommand, CancelCommand, Command, PingCommand, Said, SendCommand } from '../protocol.js'
import { type Carrier, type CarrierEvents, type Endpoint, urlOf } from './carrier.js'

type Posted = SendCommand | CancelCommand | PingCommand

export abstract class HttpCarrier implements Carrier {
  abstract readonly name: 'sse' | 'long-poll'
  readonly attachesSender = false
  protected readonly endpoint: Endpoint
  protected readonly events: CarrierEvents
  /** Aborts everything of this carrier. */
  protected readonly closing = new AbortController()
  #isProven = false
  readonly #sessions = new Map<string, AbortController>()

  constructor(endpoint: Endpoint, events: CarrierEvents) {
    this.endpoint = endpoint
    this.events = events
    queueMicrotask(() => this.isClosed || events.ready())
  }

  /** Read a session's records, from one place on, until the signal says no more. */
  protected abstract follow(attach: AttachCommand, signal: AbortSignal): Promise<void>

  command(command: Command): void {
    if (this.isClosed) return
    if (command.type === 'attach') this.#attach(command)
    else if (command.type === 'detach') this.#detach(command.session)
    else void this.#post(command)
  }

  /** A stream that sleeps cannot be asked: begin anew, after the last cursor. */
  probe(): void {
    this.ended({ code: 0, reason: 'woken up' })
  }

  close(): void {
    this.closing.abort()
  }

  protected get isClosed(): boolean {
    return this.closing.signal.aborted
  }

  protected ended(closing: Closing): void {
    if (this.isClosed) return
    this.close()
    this.events.closed(closing)
  }

  protected said(said: Said, size: number): void {
    if (!this.isClosed) this.events.said(said, size)
  }

  protected proven(): void {
    if (this.#isProven || this.isClosed) return
    this.#isProven = true
    this.events.proven()
  }

  /** The address of a session's records. */
  protected eventsUrl({ session, after, from }: AttachCommand, query: Record<string, string> = {}): URL {
    const place = after !== undefined ? { after } : from !== undefined ? { from } : {}
    return urlOf(this.endpoint, `sessions/${encodeURIComponent(session)}/events`, { ...place, ...query })
  }

  /** Ask, with the page's headers and credentials. */
  protected async request(url: URL, init: RequestInit): Promise<Response> {
    const { headers, credentials } = await this.endpoint.request()
    const fetch = this.endpoint.fetch
    return fetch(url, {
      cache: 'no-store',
      ...(credentials && { credentials }),
      ...init,
      headers: { ...headers, ...(init.headers as Record<string, string>) },
    })
  }

  /** A refusal of the gateway becomes the command's reply; anything else in between ends the carrier. */
  protected async refused(response: Response, id: string): Promise<void> {
    const text = await response.text()
    try {
      const refusal = JSON.parse(text) as { code?: unknown; message?: unknown; retryable?: unknown }
      if (typeof refusal.code === 'string' && typeof refusal.message === 'string') {
        return this.said({ retryable: false, ...refusal, type: 'error', id } as Said, text.length)
      }
    } catch {
      // Not the gateway's words; told below.
    }
    this.ended({ code: 0, reason: `unable to use ${this.name}; the answer was ${response.status}` })
  }

  #attach(attach: AttachCommand): void {
    this.#detach(attach.session)
    const leaving = new AbortController()
    this.#sessions.set(attach.session, leaving)
    const signal = AbortSignal.any([leaving.signal, this.closing.signal])
    this.follow(attach, signal).catch((error: unknown) => {
      if (!signal.aborted) this.ended({ code: 0, reason: String(error) })
    })
  }

  #detach(session: string): void {
    this.#sessions.get(session)?.abort()
    this.#sessions.delete(session)
  }

  async #post(command: Posted): Promise<void> {
    try {
      const response = await this.request(urlOf(this.endpoint, 'commands'), {
        method: 'POST',
        body: JSON.stringify(command),
        headers: { 'content-type': 'application/json' },
        signal: AbortSignal.any([this.closing.signal, AbortSignal.timeout(this.endpoint.timing.requestMs)]),
      })
      if (!response.ok) return await this.refused(response, command.id)
      const text = await response.text()
      this.answered()
      this.said({ ...(JSON.parse(text) as Said), id: command.id } as Said, text.length)
    } catch (error) {
      this.ended({ code: 0, reason: String(error) })
    }
  }

  /** A command was answered over plain HTTP. */
  protected abstract answered(): void
}
