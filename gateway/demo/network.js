// The network of one device, which does what networks do: it blocks WebSockets, it holds streams back, it goes away.
//
// The gateway's client knows nothing of it. It is given this network's `WebSocket` and `fetch` in place of the
// browser's, and has to find out by itself, as it would on a train or in an office.

const KINDS = ['websocket', 'sse', 'http']

export class Network {
  isOffline = false
  /** When the newest attempt to get through was made, as `performance.now()` tells it. */
  triedAt = 0
  #blocked = new Set()
  /** By kind: what ends all that is open of it. */
  #lines = new Map(KINDS.map((kind) => [kind, new AbortController()]))

  /** What the client is given for `WebSocket`: a class whose sockets are on this network. */
  get WebSocket() {
    const passage = () => this.#passage('websocket')
    return class extends Socket {
      constructor(url, protocols) {
        super(passage(), url, protocols)
      }
    }
  }

  /** What the client is given for `fetch`. */
  fetch = async (url, init = {}) => {
    const isStream = new Headers(init.headers).get('accept') === 'text/event-stream'
    const { fate, cut } = this.#passage(isStream ? 'sse' : 'http')
    const signal = init.signal ? AbortSignal.any([init.signal, cut]) : cut
    if (fate === 'refused') throw failure()
    if (fate === 'swallowed') return never(signal)
    return fetch(url, { ...init, signal })
  }

  /** `websocket`: no socket ever opens. `sse`: the answer to a stream is held back for ever. What is open is cut. */
  block(kind) {
    this.#blocked.add(kind)
    this.#cut(kind)
  }

  unblock(kind) {
    this.#blocked.delete(kind)
  }

  /** What is open is cut, and everything new fails at once. */
  goOffline() {
    this.isOffline = true
    for (const kind of KINDS) this.#cut(kind)
  }

  goOnline() {
    this.isOffline = false
  }

  #passage(kind) {
    this.triedAt = performance.now()
    const fate = this.isOffline ? 'refused' : this.#blocked.has(kind) ? 'swallowed' : 'passes'
    return { fate, cut: this.#lines.get(kind).signal }
  }

  #cut(kind) {
    const line = this.#lines.get(kind)
    this.#lines.set(kind, new AbortController())
    line.abort(failure())
  }
}

/** As much of a WebSocket as the client uses. */
class Socket {
  onopen = null
  onmessage = null
  onerror = null
  onclose = null
  #real = null
  #isOver = false

  constructor({ fate, cut }, url, protocols) {
    cut.addEventListener('abort', () => this.#end(new CloseEvent('close', { code: 1006 })))
    if (fate === 'refused') setTimeout(() => this.#end(new CloseEvent('close', { code: 1006 })))
    if (fate !== 'passes') return // Swallowed: nothing ever comes, not even a refusal.
    this.#real = new WebSocket(url, protocols)
    this.#real.onopen = (event) => this.#isOver || this.onopen?.(event)
    this.#real.onmessage = (event) => this.#isOver || this.onmessage?.(event)
    this.#real.onerror = (event) => this.#isOver || this.onerror?.(event)
    this.#real.onclose = (event) => this.#end(event)
  }

  get readyState() {
    return this.#isOver ? WebSocket.CLOSED : (this.#real?.readyState ?? WebSocket.CONNECTING)
  }

  send(data) {
    this.#real.send(data)
  }

  close() {
    this.#isOver = true
    this.#real?.close()
  }

  #end(event) {
    if (this.#isOver) return
    this.close()
    this.onclose?.(event)
  }
}

/** What a browser's `fetch` fails with when there is no network. */
function failure() {
  return new TypeError('unable to fetch; this device has no network')
}

function never(signal) {
  return new Promise((_, reject) => {
    const end = () => reject(signal.reason)
    if (signal.aborted) end()
    signal.addEventListener('abort', end)
  })
}
