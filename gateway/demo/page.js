// The page: two devices on one chat, their buttons, and what the backend says of itself.

import { Device, mintId } from './device.js'
import { Transcript } from './transcript.js'

const STATUS_INTERVAL = 400
const SHORT_CUT_SECONDS = 3

const address = new URL(location.href)
if (!address.searchParams.get('chat')) {
  address.searchParams.set('chat', `demo-${mintId().slice(0, 10)}`)
  history.replaceState(null, '', address)
}
const session = address.searchParams.get('chat')

const panes = []

/** Who did it, as a person would say it. A client's id starts with its device's name. */
function nameOf(by) {
  if (by?.backend) return 'the backend'
  const own = panes.find((pane) => pane.device.client === by?.client)
  if (own) return own.name
  const device = /^(laptop|phone)-/.exec(by?.client ?? '')?.[1]
  return device ? `${device[0].toUpperCase()}${device.slice(1)} in another window` : 'another client'
}

const STATE_NAMES = {
  connecting: 'connecting',
  'catching-up': 'catching up',
  live: 'live',
  offline: 'offline',
  refused: 'refused',
}

/** One device on the screen: its elements follow it, its buttons steer it. */
class Pane {
  constructor(section) {
    this.section = section
    this.name = section.dataset.name
    this.parts = {}
    for (const element of section.querySelectorAll('[data-is]')) this.parts[element.dataset.is] = element
    this.transcript = new Transcript(this.parts.scroller, nameOf)
    this.device = new Device({ session, client: `${this.name.toLowerCase()}-${mintId().slice(0, 8)}` })
    this.#listen()
    this.#showSoon()
  }

  #listen() {
    const { device, transcript, parts } = this
    device.addEventListener('state', () => this.#showSoon())
    device.addEventListener('reset', () => {
      transcript.reset()
      parts['caught-up'].textContent = ''
      parts.notice.textContent = ''
    })
    device.addEventListener('record', ({ detail: { record, late } }) => {
      const told = transcript.add(record, late)
      if (told) parts.told.textContent = told
    })
    device.addEventListener('caught-up', ({ detail: { records, milliseconds } }) => {
      parts['caught-up'].textContent = `caught up: ${records} records in ${milliseconds} ms`
    })
    device.addEventListener('notice', ({ detail: { text } }) => (parts.notice.textContent = text))

    parts.form.addEventListener('submit', (event) => {
      event.preventDefault()
      this.ask(parts.text.value)
      parts.text.value = ''
    })
    parts.stop.addEventListener('click', () => device.cancel())
    parts.cut.addEventListener('click', () => (device.cut ? this.#restore() : this.#cut()))
    parts['cut-short'].addEventListener('click', () => this.#cut(SHORT_CUT_SECONDS))
    parts.reload.addEventListener('click', () => device.reload())
    for (const button of parts.empty.querySelectorAll('button')) {
      button.addEventListener('click', () => this.ask(button.textContent))
    }
  }

  ask(text) {
    if (!text.trim()) return
    this.parts.notice.textContent = ''
    this.device.send(text.trim())
  }

  #cut(seconds) {
    clearTimeout(this.timer)
    this.parts['caught-up'].textContent = ''
    this.device.cutNetwork()
    if (seconds) this.timer = setTimeout(() => this.#restore(), seconds * 1000)
  }

  #restore() {
    clearTimeout(this.timer)
    this.device.restoreNetwork()
  }

  /** Once per picture is enough, however many records it holds. */
  #showSoon() {
    this.pending ??= requestAnimationFrame(() => {
      this.pending = null
      this.#show()
    })
  }

  #show() {
    const { device, parts, section } = this
    const connected = device.state === 'live' || device.state === 'catching-up'
    section.dataset.state = device.state
    set(parts.state, STATE_NAMES[device.state])
    this.#showCounter()
    this.#showWaiting(connected)
    section.classList.toggle('cut-off', device.cut)
    parts['cut-short'].disabled = device.cut
    parts.stop.disabled = !connected || device.running.size === 0
    parts.empty.hidden = device.records > 0 || device.outbox.size > 0
  }

  #showWaiting(connected) {
    const questions = [...this.device.outbox.values()].map((body) => `“${body.messages[0].parts[0].text}”`)
    this.parts.waiting.hidden = questions.length === 0
    const told = connected ? 'sending' : 'will be sent once, when the network is back:'
    set(this.parts.waiting, `${told} ${questions.join(', ')}`)
  }

  #showCounter() {
    const { records, first, last, gaps, duplicates } = this.device
    const since = first > 1 ? ` (from ${first})` : ''
    const count = (number, noun) => `${number || 'no'} ${noun}${number === 1 ? '' : 's'}`
    const proof = `offset ${last}${since} · ${count(gaps, 'gap')} · ${count(duplicates, 'duplicate')}`
    set(this.parts.counter, records + duplicates ? proof : 'nothing read yet')
    this.parts.counter.classList.toggle('broken', gaps + duplicates > 0)
  }
}

function set(element, text) {
  if (element.textContent !== text) element.textContent = text
}

// ---- what the backend says of itself, past every device ----

const model = document.querySelector('[data-is="model"]')
const modelState = document.querySelector('[data-is="model-state"]')
const modelChunks = document.querySelector('[data-is="model-chunks"]')
const modelCounts = document.querySelector('[data-is="model-counts"]')

function modelSays({ running, last }) {
  if (running) return ['running', running > 1 ? `producing ${running} answers` : 'producing']
  if (last === 'stoppedByClose') return ['stopped', 'stopped by the gateway']
  return last ? ['idle', 'finished its answer'] : ['idle', 'waiting for a question']
}

async function pollStatus() {
  try {
    const response = await fetch('/demo/status', { signal: AbortSignal.timeout(5000) })
    if (!response.ok) throw new Error(`status ${response.status}`)
    const status = await response.json()
    const [state, text] = modelSays(status)
    model.dataset.state = state
    set(modelState, text)
    set(modelChunks, `${status.chunks} chunks`)
    set(modelCounts, ` · ${status.finished} finished · ${status.stoppedByClose} stopped`)
  } catch {
    model.dataset.state = 'away'
    set(modelState, 'cannot be reached')
  }
  setTimeout(pollStatus, document.hidden ? 5 * STATUS_INTERVAL : STATUS_INTERVAL)
}

const template = document.querySelector('#pane')
for (const section of document.querySelectorAll('.pane')) {
  const copy = template.content.cloneNode(true)
  const id = section.dataset.name.toLowerCase()
  copy.querySelector('h2').id = `${id}-name`
  copy.querySelector('h2').textContent = section.dataset.name
  copy.querySelector('[data-is="text"]').id = `${id}-text`
  copy.querySelector('label').htmlFor = `${id}-text`
  copy.querySelector('label').textContent = `Question, from the ${section.dataset.name}`
  copy.querySelector('[data-is="scroller"]').setAttribute('aria-label', `What the ${section.dataset.name} has read`)
  section.append(copy)
  panes.push(new Pane(section))
}
document.querySelector('[data-is="chat"]').textContent = session
document.querySelector('[data-is="join"]').href = address.href
pollStatus()
