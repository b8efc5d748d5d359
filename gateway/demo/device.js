// A client of the session protocol, version 1, over WebSocket (docs/protocol.md). It knows no DOM.
//
// Rule 1: the cursor of the last record taken in is all that it must remember to go on after a break.
// Rule 2: a broken connection says nothing to the gateway; only `cancel` ends a turn.
// Rule 3: a send has a turn id, minted here, and is sent again with the same id until it is answered.

const FIRST_FINAL_CLOSE_CODE = 4500
const OPEN_TIMEOUT = 10_000
const LONGEST_BACKOFF = 10_000
const LIVE_BATCH = 3 // A frame of the live stream holds few records, one of a catch-up holds many.
const QUIET = 250 // So long without a frame also means that there is nothing left to catch up with.

/** 128 random bits. `crypto.randomUUID` would do, but a phone on plain http has none. */
export function mintId() {
  const bytes = crypto.getRandomValues(new Uint8Array(16))
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, '0')).join('')
}

/**
 * One device attached to one session.
 *
 * Dispatches `state` when something below has changed, `record` {record, late} for each record in offset order
 * (`late`: it was caught up with after a break), `reset` when all records so far are to be forgotten,
 * `caught-up` {records, milliseconds}, and `notice` {text} for what a person should be told.
 */
export class Device extends EventTarget {
  state = 'connecting' // connecting, catching-up, live, offline (its network is cut), refused
  cut = false
  running = new Set() // turns without their end
  outbox = new Map() // turn -> body, sent or to be sent, not yet answered
  #socket = null
  #timer = 0 // the next attempt to connect
  #quiet = 0
  #attempt = 0
  #heard = 0
  #patience = OPEN_TIMEOUT
  #commands = new Map() // id -> command, until its reply

  constructor({ session, client }) {
    super()
    this.session = session
    this.client = client
    this.#forget()
    // Half-open connections are silent; a timer notices what no event tells.
    setInterval(() => this.#socket && performance.now() - this.#heard > this.#patience && this.#lost(), 1000)
    addEventListener('online', () => this.#timer && this.#connect())
    this.#connect()
  }

  // ---- what a person does ----

  /** Ask a question; the answer comes as records. Kept until the gateway has accepted it. */
  send(text) {
    const turn = mintId()
    const message = { id: mintId(), role: 'user', parts: [{ type: 'text', text }] }
    this.outbox.set(turn, { trigger: 'submit-message', messages: [message] })
    this.#sendTurn(turn)
    this.#tell('state')
  }

  /** End every running turn. Their `turn-end` records tell everybody. */
  cancel() {
    this.#command({ type: 'cancel', session: this.session })
  }

  cutNetwork() {
    this.cut = true
    this.#drop()
    this.#become('offline')
  }

  restoreNetwork() {
    this.cut = false
    this.#attempt = 0
    this.#connect()
  }

  /** What a reload of a page does: nothing is remembered, everything is read again. */
  reload() {
    this.#drop()
    this.outbox.clear()
    this.#forget()
    this.#tell('reset')
    if (this.cut) this.#tell('state')
    else this.#connect()
  }

  // ---- the connection ----

  #connect() {
    this.#drop()
    if (this.cut) return
    this.#become('connecting')
    const url = new URL(`/gateway/v1/ws?client=${encodeURIComponent(this.client)}`, location.href)
    url.protocol = url.protocol.replace('http', 'ws')
    const socket = new WebSocket(url, 'session-gateway.v1')
    this.#socket = socket
    this.#heard = performance.now()
    this.#patience = OPEN_TIMEOUT
    socket.onmessage = ({ data }) => this.#socket === socket && this.#frame(data)
    socket.onclose = ({ code, reason }) => this.#socket === socket && this.#lost(code, reason)
  }

  /** Close hard: whatever this socket still delivers is not looked at. */
  #drop() {
    const socket = this.#socket
    this.#socket = null
    this.#attached = false
    this.#commands.clear()
    clearTimeout(this.#timer)
    clearTimeout(this.#quiet)
    this.#timer = 0
    socket?.close()
  }

  #lost(code = 0, reason = '') {
    this.#drop()
    if (code >= FIRST_FINAL_CLOSE_CODE && code < 5000) {
      this.#become('refused')
      this.#tell('notice', { text: `the gateway closed the connection: ${reason || code}` })
      return
    }
    // Full jitter: a thousand devices that lost the same node do not come back in the same moment.
    const longest = Math.min(LONGEST_BACKOFF, 500 * 2 ** this.#attempt++)
    this.#reconnect(Math.random() * longest)
  }

  #reconnect(milliseconds) {
    this.#drop()
    this.#timer = setTimeout(() => this.#connect(), milliseconds)
    this.#become('connecting')
  }

  // ---- frames ----

  #frame(data) {
    const before = this.records
    this.#heard = performance.now()
    for (const line of data.split('\n')) if (line && this.#socket) this.#take(JSON.parse(line))
    if (this.state !== 'catching-up') return
    clearTimeout(this.#quiet)
    const batch = this.records - before
    if (batch > LIVE_BATCH) this.#backlog = { records: this.records - this.#known, at: performance.now() }
    if (batch > 0 && batch <= LIVE_BATCH) this.#nowLive()
    else this.#quiet = setTimeout(() => this.#nowLive(), QUIET)
  }

  #take(push) {
    const command = this.#commands.get(push.id)
    this.#commands.delete(push.id)
    switch (push.type) {
      case 'hello':
        this.#patience = 2 * push.heartbeat * 1000
        this.#attach()
        break
      case 'attached':
        this.#onAttached(push)
        break
      case 'accepted':
        this.outbox.delete(push.turn)
        this.#tell('notice', { text: '' })
        this.#tell('state')
        break
      case 'turn-start':
      case 'chunk':
      case 'turn-end':
        this.#onRecord(push)
        break
      case 'resync': // We are detached; what we have may not be what the journal has.
        this.#startOver(push.reason)
        this.#attach()
        break
      case 'goaway':
        this.#reconnect(push.after)
        break
      case 'error':
        this.#onRefused(push, command)
        break
      default: // heartbeat, pong, cancelled (the turn-end tells more), and what later versions may add
    }
  }

  #attached = false
  #asked = 0
  #known = 0 // how many records we had when we attached
  #backlog = null

  #attach() {
    this.#asked = performance.now()
    this.#known = this.records
    this.#backlog = null
    const after = this.cursor ? { after: this.cursor } : {}
    this.#command({ type: 'attach', session: this.session, ...after })
  }

  #onAttached({ resync }) {
    if (resync) this.#startOver(resync)
    else this.#tell('notice', { text: '' })
    this.#attached = true
    this.#attempt = 0
    this.#become('catching-up')
    for (const turn of this.outbox.keys()) this.#sendTurn(turn)
  }

  #onRecord(record) {
    if (this.last && record.offset <= this.last) {
      this.duplicates += 1
      return this.#tell('state')
    }
    if (this.last && record.offset > this.last + 1) this.gaps += record.offset - this.last - 1
    this.first ||= record.offset
    this.last = record.offset
    this.cursor = record.cursor
    this.records += 1
    this.outbox.delete(record.turn) // Its turn-start is as good as the `accepted` that a cut has swallowed.
    if (record.type === 'turn-end') this.running.delete(record.turn)
    else this.running.add(record.turn)
    const late = this.state === 'catching-up' && this.#known > 0
    this.#tell('record', { record, late })
    this.#tell('state')
  }

  #onRefused({ code, message, retryable, retryAfter }, command) {
    this.#tell('notice', { text: message ?? code })
    const delay = (retryAfter ?? 1) * 1000
    if (command?.type === 'send') {
      if (retryable) setTimeout(() => this.#sendTurn(command.turn), delay)
      else this.outbox.delete(command.turn)
    } else if (command?.type === 'attach') {
      if (retryable) return this.#reconnect(delay)
      this.#drop()
      this.#become('refused')
    }
    this.#tell('state')
  }

  // ---- small things ----

  /** Does nothing while we are not attached: attaching sends what is left. */
  #sendTurn(turn) {
    if (!this.#attached || !this.outbox.has(turn)) return
    this.#command({ type: 'send', session: this.session, turn, body: this.outbox.get(turn) })
  }

  #command(command) {
    if (this.#socket?.readyState !== WebSocket.OPEN) return
    const id = mintId()
    this.#commands.set(id, command)
    this.#socket.send(JSON.stringify({ ...command, id }))
  }

  #nowLive() {
    if (this.#backlog && this.#known > 0) {
      const { records, at } = this.#backlog
      this.#tell('caught-up', { records, milliseconds: Math.max(1, Math.round(at - this.#asked)) })
    }
    this.#become('live')
  }

  #startOver(reason) {
    this.#forget()
    this.#known = 0
    this.#tell('reset')
    this.#tell('notice', { text: `started over: ${reason}` })
  }

  #forget() {
    this.cursor = null
    this.first = 0
    this.last = 0
    this.records = 0
    this.gaps = 0
    this.duplicates = 0
    this.running.clear()
  }

  #become(state) {
    this.state = state
    this.#tell('state')
  }

  #tell(type, detail) {
    this.dispatchEvent(new CustomEvent(type, { detail }))
  }
}
