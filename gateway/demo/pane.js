// One device on the screen: a gateway connection on a network of its own, what it reads, and the buttons of both.

import { GatewayConnection, mintId } from '/gateway/v1/client.js'
import { Network } from './network.js'
import { Proof } from './proof.js'
import { Transcript } from './transcript.js'

const CARRIERS = { websocket: 'WebSocket', sse: 'SSE', 'long-poll': 'long-poll' }

const BEST_FIRST = Object.keys(CARRIERS)

const NOTHING_MISSED = 'nothing missed'

/** Shorter than the client's own: whoever flips a switch here looks at it, and wants to see what it does. */
const TIMING = {
  helloMs: 1500,
  backoffBaseMs: 300,
  backoffMaxMs: 3000,
  reprobeMs: 2000,
  reprobeSoonMs: 500,
}

export class Pane {
  #network = new Network()
  #connection = null
  #proof = new Proof()
  #running = new Set() // turns without their end
  #outbox = new Map() // turn -> question, until it is accepted
  #stops = 0 // cancels without their reply
  #state = 'idle'
  #carrier = '' // the last one that got through
  #change = ''
  #known = 0 // how many records there were when catching up began
  #back = 0 // when the network is back
  #ticking = 0
  #pending = 0

  /** @param nameOf - Says who did something. @param offlineSeconds - How long its network goes away. */
  constructor(section, { session, nameOf, offlineSeconds }) {
    this.section = section
    this.session = session
    this.name = section.dataset.name
    this.client = `${this.name.toLowerCase()}-${mintId().slice(0, 8)}`
    this.offlineSeconds = offlineSeconds
    this.parts = {}
    for (const element of section.querySelectorAll('[data-is]')) this.parts[element.dataset.is] = element
    this.transcript = new Transcript(this.parts.scroller, nameOf)
    this.#listen()
    this.#connect()
  }

  #listen() {
    const { parts } = this
    parts.form.addEventListener('submit', (event) => {
      event.preventDefault()
      this.#ask(parts.text.value.trim())
      parts.text.value = ''
    })
    for (const button of parts.empty.querySelectorAll('button')) {
      button.addEventListener('click', () => this.#ask(button.textContent))
    }
    parts.stop.addEventListener('click', () => this.#stop())
    parts.reload.addEventListener('click', () => this.#reload())
    parts.offline.addEventListener('click', () => (this.#network.isOffline ? this.#goOnline() : this.#goOffline()))
    for (const kind of ['websocket', 'sse']) {
      parts[`block-${kind}`].addEventListener('change', ({ target }) => this.#block(kind, target.checked))
    }
  }

  // ---- the gateway ----

  #connect() {
    const connection = new GatewayConnection({
      client: this.client,
      // The query changes nothing but this: what has worked is remembered for each device by itself.
      url: `/?${this.name}`,
      WebSocket: this.#network.WebSocket,
      fetch: this.#network.fetch,
      timing: TIMING,
    })
    this.#connection = connection
    connection.subscribe(() => this.#connection === connection && this.#onStatus())
    connection.attach(this.session, {
      record: (record) => this.#onRecord(record),
      reset: (reason) => {
        this.#forget()
        this.#notice(`started over: ${reason}`)
      },
      failed: (error) => this.#connection === connection && this.#notice(error.message),
    })
    this.#onStatus()
  }

  #onStatus() {
    const { state, carrier } = this.#connection.status
    const before = this.#state
    this.#state = state
    if (state === 'catching-up' || state === 'live') this.#onCarrier(carrier)
    if (state === 'catching-up' && before !== state) this.#known = this.#proof.records
    if (state === 'live' && before === 'catching-up') this.#onCaughtUp()
    if (state === 'closed') this.#notice(this.#connection.status.error?.message ?? 'closed')
    this.#showSoon()
  }

  #onCarrier(carrier) {
    const before = this.#carrier
    this.#carrier = carrier
    if (!before || before === carrier) return
    this.#change = `${CARRIERS[before]} → ${CARRIERS[carrier]}`
    const { route } = this.parts
    route.classList.remove('changed')
    void route.offsetWidth // Without a layout in between, the animation would not begin again.
    route.classList.add('changed')
  }

  #onCaughtUp() {
    const records = this.#known && this.#proof.records - this.#known
    const milliseconds = Math.max(1, Math.round(performance.now() - this.#network.triedAt))
    const told = records ? `caught up: ${records} record${records === 1 ? '' : 's'} in ${milliseconds} ms` : NOTHING_MISSED
    this.#news(this.#change ? `${this.#change} · ${told}` : told)
    this.#change = ''
  }

  #onRecord(record) {
    const isLate = this.#connection.status.state === 'catching-up' && this.#known > 0
    this.#proof.take(record)
    if (record.type === 'turn-end') this.#running.delete(record.turn)
    else this.#running.add(record.turn)
    const told = this.transcript.add(record, isLate)
    if (told) this.parts.told.textContent = told
    this.#showSoon()
  }

  // ---- what a person does ----

  /** The client keeps a question until the gateway has accepted it, and asks it once. */
  async #ask(text) {
    if (!text) return
    const turn = mintId()
    const message = { id: mintId(), role: 'user', parts: [{ type: 'text', text }] }
    const body = { trigger: 'submit-message', messages: [message] }
    this.#outbox.set(turn, text)
    await this.#do((connection) => connection.send(this.session, { turn, body }))
    this.#outbox.delete(turn)
    this.#showSoon()
  }

  /** Each by its name: what others ask for before this gets through is not meant. */
  async #stop() {
    const turns = [...this.#running]
    this.#stops += 1
    await this.#do((connection) => Promise.all(turns.map((turn) => connection.cancel(this.session, turn))))
    this.#stops -= 1
    this.#showSoon()
  }

  /** Tells what the gateway refuses. What a reload has forgotten may fail unheard. */
  async #do(work) {
    const connection = this.#connection
    this.#notice('')
    this.#showSoon()
    try {
      await work(connection)
    } catch (error) {
      if (this.#connection === connection) this.#notice(error.message)
    }
  }

  /** What a reload of a page does: nothing is remembered, everything is read again. */
  #reload() {
    const connection = this.#connection
    this.#connection = null
    connection.close()
    this.#forget()
    this.#outbox.clear()
    this.#state = 'idle'
    this.#carrier = this.#change = ''
    this.#connect()
  }

  #forget() {
    this.#proof = new Proof()
    this.#known = 0
    this.#running.clear()
    this.transcript.reset()
    this.#notice('')
    this.#showSoon()
  }

  // ---- its network ----

  #block(kind, isBlocked) {
    const isBetter = BEST_FIRST.indexOf(kind) < BEST_FIRST.indexOf(this.#carrier)
    if (isBlocked && kind === this.#carrier) this.#news('looking for another way')
    if (!isBlocked && isBetter) this.#news(`${CARRIERS[kind]} will be tried again`)
    if (isBlocked) this.#network.block(kind)
    else this.#network.unblock(kind)
    this.#showSoon()
  }

  #goOffline() {
    this.#news(this.#proof.records ? `goes on after offset ${this.#proof.last}` : '')
    this.#network.goOffline()
    this.#back = performance.now() + this.offlineSeconds * 1000
    this.#ticking = setInterval(() => (performance.now() < this.#back ? this.#show() : this.#goOnline()), 100)
    this.#showSoon()
  }

  #goOnline() {
    clearInterval(this.#ticking)
    this.#network.goOnline()
    // What the browser's `online` event does, when it is the browser whose network is back.
    this.#connection.reconnect()
    this.#showSoon()
  }

  // ---- what is shown ----

  #news(text) {
    set(this.parts.news, text)
  }

  #notice(text) {
    set(this.parts.notice, text)
  }

  /** Once per picture is enough, however many records it holds. */
  #showSoon() {
    this.#pending ||= requestAnimationFrame(() => {
      this.#pending = 0
      this.#show()
    })
  }

  #show() {
    const { parts, section } = this
    const { isOffline } = this.#network
    const { state, carrier } = this.#connection.status
    const shown = isOffline ? 'offline' : state
    section.dataset.state = shown
    section.dataset.carrier = carrier
    set(parts.carrier, isOffline ? 'no network' : CARRIERS[carrier])
    set(parts.state, shown.replace('-', ' '))
    set(parts.counter, String(this.#proof))
    parts.counter.classList.toggle('broken', this.#proof.isBroken)
    section.classList.toggle('cut-off', isOffline)
    const left = Math.ceil((this.#back - performance.now()) / 1000)
    set(parts.offline, isOffline ? `Back in ${left} s` : `Go offline ${this.offlineSeconds} s`)
    parts.stop.disabled = this.#running.size === 0
    parts.empty.hidden = this.#proof.records > 0 || this.#outbox.size > 0
    this.#showWaiting(shown === 'live' || shown === 'catching-up')
  }

  #showWaiting(isConnected) {
    const questions = [...this.#outbox.values()].map((text) => `“${text}”`).join(', ')
    const stop = this.#stops ? 'Stop' : ''
    const what = [stop, questions].filter(Boolean).join(', ')
    this.parts.waiting.hidden = !what
    set(this.parts.waiting, isConnected ? `sending ${what}` : `will be sent once, when the network is back: ${what}`)
  }
}

function set(element, text) {
  if (element.textContent !== text) element.textContent = text
}
