/** Where the gateway is, and what a connection to it is made with. */
import type { Endpoint } from './carriers/carrier.js'
import type { CarrierName } from './protocol.js'
import type { Timing } from './timing.js'

export interface GatewayConnectionOptions {
  /** The gateway's base URL. Default: the page's own origin. */
  readonly url?: string | URL | undefined
  /** Allowed carriers, best first. Default: `websocket`, `sse`, `long-poll`. */
  readonly carriers?: readonly CarrierName[] | undefined
  /** This client's id, 1 to 128 printable ASCII characters; others see it as `by.client`. Default: a random one. */
  readonly client?: string | undefined
  /** For the requests of the HTTP carriers, asked for at each; a WebSocket of a browser can have none. */
  readonly request?: Endpoint['request'] | undefined
  readonly fetch?: typeof fetch | undefined
  readonly WebSocket?: typeof WebSocket | undefined
  readonly timing?: Partial<Timing> | undefined
}

/** What the carriers are given. Not made before it is needed: on a server there is no page. */
export function endpointOf(options: GatewayConnectionOptions, client: string, timing: Timing): Endpoint {
  return {
    base: baseUrl(options.url),
    client,
    timing,
    // Looked up at each request: a page may patch its own.
    fetch: options.fetch ?? ((...request) => globalThis.fetch(...request)),
    WebSocket: options.WebSocket ?? globalThis.WebSocket,
    request: options.request ?? (async () => ({ headers: {}, credentials: undefined })),
  }
}

function baseUrl(url: string | URL | undefined): URL {
  const page = globalThis.location?.href
  if (url === undefined && page === undefined) {
    throw new TypeError('unable to find the gateway; there is no page here, so give its `url`')
  }
  const base = new URL(url ?? '/', page)
  // A path is a folder here, and its last slash is easily forgotten.
  if (!base.pathname.endsWith('/')) base.pathname += '/'
  return base
}
