/** The session protocol on a WebSocket: one socket, many sessions. */
import type { Closing } from '../connection-state.js'
import { type Command, mintId, PROTOCOL, parseLine, type Said, SUBPROTOCOL } from '../protocol.js'
import { type Carrier, type CarrierEvents, type Endpoint, Silence, urlOf } from './carrier.js'

/** WebSocket.OPEN, which an injected class may not have. */
const OPEN = 1

export class WebSocketCarrier implements Carrier {
  readonly name = 'websocket'
  readonly attachesSender = true
  readonly #events: CarrierEvents
  readonly #socket: WebSocket
  readonly #silence: Silence
  readonly #probeMs: number
  #isGreeted = false
  #isClosed = false
  #probe: ReturnType<typeof setTimeout> | undefined

  /** @throws TypeError - There is no WebSocket here. */
  constructor(endpoint: Endpoint, events: CarrierEvents) {
    if (!endpoint.WebSocket) throw new TypeError('unable to open a WebSocket; there is none here')
    this.#events = events
    this.#probeMs = endpoint.timing.probeMs
    const url = urlOf(endpoint, 'ws')
    url.protocol = url.protocol.replace('http', 'ws')
    this.#socket = new endpoint.WebSocket(url, SUBPROTOCOL)
    this.#silence = new Silence(() => this.#ended({ timedOut: !this.#isGreeted }))
    this.#silence.within(endpoint.timing.helloMs)
    this.#socket.onmessage = ({ data }: MessageEvent<unknown>) => this.#frame(data)
    this.#socket.onclose = (closing) => this.#ended(closing)
    // Once it was open a close follows, and tells more; but Node 22 tells of a handshake that failed by this alone.
    this.#socket.onerror = () => this.#isGreeted || this.#ended({})
  }

  command(command: Command): void {
    if (this.#socket.readyState === OPEN) this.#socket.send(JSON.stringify(command))
  }

  probe(): void {
    if (this.#probe !== undefined) return
    this.command({ type: 'ping', id: mintId() })
    // It stands behind what is still being written: a picture on a bad mobile network, at 16 kB/s.
    const wait = this.#probeMs + (this.#socket.bufferedAmount || 0) / 16
    this.#probe = setTimeout(() => this.#ended({}), wait)
  }

  close(): void {
    this.#isClosed = true
    this.#silence.stop()
    clearTimeout(this.#probe)
    this.#socket.onmessage = this.#socket.onclose = null
    this.#socket.close()
  }

  #ended(closing: Closing): void {
    if (this.#isClosed) return
    // What this socket may still deliver is not looked at: it is had again from the next one.
    this.close()
    this.#events.closed(closing)
  }

  #frame(data: unknown): void {
    this.#silence.heard()
    clearTimeout(this.#probe)
    this.#probe = undefined
    for (const line of String(data).split('\n')) {
      if (this.#isClosed) return
      let said: Said
      try {
        said = parseLine(line)
      } catch {
        return this.#ended({})
      }
      if (said.type === 'hello') this.#greeted(said)
      if (!this.#isClosed) this.#events.said(said, line.length)
    }
  }

  #greeted({ protocol, heartbeat }: Extract<Said, { type: 'hello' }>): void {
    if (protocol !== PROTOCOL) {
      const reason = `unable to speak protocol ${protocol} of this gateway; this client speaks ${PROTOCOL}, upgrade it`
      return this.#ended({ reason, final: true })
    }
    this.#isGreeted = true
    this.#silence.within(2_000 * heartbeat)
    this.#events.proven()
    this.#events.ready()
  }
}
