import type { Closing } from '../connection-state.js'
import type { CarrierName, Command, Said } from '../protocol.js'
import type { Timing } from '../timing.js'

/** What a carrier is told, and tells. All calls come from the carrier's own callbacks, never from within `command`. */
export interface CarrierEvents {
  /** Commands may be given from now on. */
  ready(): void
  /** A sign of the gateway: this carrier works on this network. Once. */
  proven(): void
  /** @param size - Of the line, in UTF-16 units. */
  said(said: Said, size: number): void
  /** It is over; nothing is told after this. Once, and never after `close()`. */
  closed(closing: Closing): void
}

/** One way to carry the session protocol: made open, used until it is closed, and never used again. */
export interface Carrier {
  readonly name: CarrierName
  /** Whether a `send` attaches its sender, as it does on a socket. */
  readonly attachesSender: boolean
  command(command: Command): void
  /** The page woke up: find out soon whether this still works. */
  probe(): void
  close(): void
}

/** Where the gateway is, and what is asked with. */
export interface Endpoint {
  /** The gateway's base URL, ending in a slash. */
  readonly base: URL
  readonly client: string
  readonly timing: Timing
  readonly fetch: typeof fetch
  readonly WebSocket: typeof WebSocket | undefined
  /** For the requests of the HTTP carriers; a WebSocket of a browser has none. */
  request(): Promise<{ headers: Record<string, string>; credentials: RequestCredentials | undefined }>
}

/** The address of one of the gateway's endpoints, with this client's name in it. */
export function urlOf(endpoint: Endpoint, path: string, query: Record<string, string> = {}): URL {
  const url = new URL(`gateway/v1/${path}`, endpoint.base)
  for (const [name, value] of Object.entries({ client: endpoint.client, ...query }))
    url.searchParams.set(name, value)
  return url
}

/** Calls back after a silence. Hearing costs nothing: the timer is armed once per interval, whatever the traffic. */
export class Silence {
  #timer: ReturnType<typeof setTimeout> | undefined
  #heard = 0
  #milliseconds = 0
  readonly #whenSilent: () => void

  constructor(whenSilent: () => void) {
    this.#whenSilent = whenSilent
  }

  /** From now on, so long. Replaces what was set before. */
  within(milliseconds: number): void {
    this.stop()
    this.#milliseconds = milliseconds
    this.heard()
    this.#timer = setTimeout(this.#look, milliseconds)
  }

  heard(): void {
    this.#heard = performance.now()
  }

  stop(): void {
    clearTimeout(this.#timer)
  }

  readonly #look = () => {
    const left = this.#heard + this.#milliseconds - performance.now()
    // A timer may fire a little early; less than a millisecond is none.
    if (left < 1) this.#whenSilent()
    else this.#timer = setTimeout(this.#look, left)
  }
}
