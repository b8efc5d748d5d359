/** What the two carriers over plain HTTP share: commands are POSTed, refusals are read. */
import type { Closing } from '../connection-state.js'
import {
  type AttachCommand,
  type CancelCommand,
  type Command,
  type PingCommand,
  parseLine,
  type Refused,
  type Said,
  type SendCommand,
} from '../protocol.js'
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
    this.ended({})
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

  /** Ask, for so long at most. `AbortSignal.any`, which would do, is younger than many a browser (Safari 17.4). */
  protected async within<T>(
    milliseconds: number,
    signal: AbortSignal,
    ask: (signal: AbortSignal) => Promise<T>,
  ): Promise<T> {
    const asking = new AbortController()
    const abort = () => asking.abort()
    const timer = setTimeout(abort, milliseconds)
    signal.addEventListener('abort', abort, { signal: asking.signal })
    // A page's own `headers()` that never answers does not hear the signal.
    const late = new Promise<never>((_, failed) => {
      asking.signal.addEventListener('abort', () => failed(asking.signal.reason))
    })
    if (signal.aborted) abort()
    try {
      return await Promise.race([ask(asking.signal), late])
    } finally {
      clearTimeout(timer)
      abort()
    }
  }

  /** A refusal of the gateway becomes the command's reply; anything else in between ends the carrier. */
  protected async refused(response: Response, id: string, isCommand = false): Promise<void> {
    const text = await response.text()
    try {
      const refusal = JSON.parse(text) as Partial<Refused>
      if (refusal.code && typeof refusal.retryable === 'boolean') {
        return this.said({ ...refusal, type: 'error', id } as Refused, text.length)
      }
    } catch {
      // Not the gateway's words; told below.
    }
    const { status } = response
    const message = `unable to use ${this.name}; the answer was ${status}`
    // One message may be too much for what stands in between (its size, a firewall's rules): asked again it is refused again.
    if (isCommand && [400, 403, 413, 414, 422, 431].includes(status))
      return this.said({ type: 'error', id, code: 'refused-on-the-way', message, retryable: false }, 0)
    this.ended({})
  }

  #attach(attach: AttachCommand): void {
    this.#detach(attach.session)
    const leaving = new AbortController()
    this.#sessions.set(attach.session, leaving)
    const { signal } = leaving
    this.closing.signal.addEventListener('abort', () => leaving.abort(), { signal })
    this.follow(attach, signal).catch(() => {
      if (!signal.aborted) this.ended({})
    })
  }

  #detach(session: string): void {
    this.#sessions.get(session)?.abort()
    this.#sessions.delete(session)
  }

  async #post(command: Posted): Promise<void> {
    const body = JSON.stringify(command)
    // A picture on a bad mobile network: 16 kB/s are waited for.
    const wait = this.endpoint.timing.requestMs + body.length / 16
    try {
      await this.within(wait, this.closing.signal, async (signal) => {
        const headers = { 'content-type': 'application/json' }
        const response = await this.request(urlOf(this.endpoint, 'commands'), {
          method: 'POST',
          body,
          headers,
          signal,
        })
        if (!response.ok) return this.refused(response, command.id, true)
        const text = await response.text()
        const said = parseLine(text)
        this.answered()
        this.said({ ...said, id: command.id } as Said, text.length)
      })
    } catch {
      this.ended({})
    }
  }

  /** A command was answered over plain HTTP. */
  protected abstract answered(): void
}
