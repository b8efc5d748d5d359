// The page: two devices on one chat, and what the backend says of itself.

const CLIENT = '/gateway/v1/client.js'
const STATUS_INTERVAL = 400
const OFFLINE_SECONDS = 5

const find = (name) => document.querySelector(`[data-is="${name}"]`)
const panes = []

/** Who did it, as a person would say it. A client's id starts with its device's name. */
function nameOf(by) {
  if (by?.backend) return 'the backend'
  const own = panes.find((pane) => pane.client === by?.client)
  if (own) return own.name
  const device = /^(laptop|phone)-/.exec(by?.client ?? '')?.[1]
  return device ? `${device[0].toUpperCase()}${device.slice(1)} in another window` : 'another client'
}

// ---- the devices ----

async function openPanes() {
  const { mintId } = await import(CLIENT)
  const { Pane } = await import('./pane.js')
  const address = new URL(location.href)
  if (!address.searchParams.get('chat')) {
    address.searchParams.set('chat', `demo-${mintId().slice(0, 10)}`)
    history.replaceState(null, '', address)
  }
  const session = address.searchParams.get('chat')
  const offlineSeconds = Number(address.searchParams.get('offline')) || OFFLINE_SECONDS
  find('chat').textContent = session
  find('join').href = address.href
  for (const section of document.querySelectorAll('.pane')) {
    section.append(furnish(section.dataset.name))
    panes.push(new Pane(section, { session, nameOf, offlineSeconds }))
  }
}

/** A pane's elements, named so that they are told apart by ear. */
function furnish(name) {
  const copy = document.querySelector('#pane').content.cloneNode(true)
  const id = name.toLowerCase()
  copy.querySelector('h2').id = `${id}-name`
  copy.querySelector('h2').textContent = name
  copy.querySelector('[data-is="text"]').id = `${id}-text`
  copy.querySelector('.question-label').htmlFor = `${id}-text`
  copy.querySelector('.question-label').textContent = `Question, from the ${name}`
  copy.querySelector('.blocks').setAttribute('aria-label', `The ${name}’s network`)
  copy.querySelector('[data-is="scroller"]').setAttribute('aria-label', `What the ${name} has read`)
  return copy
}

/** Without the client there is nothing to show; say which of its reasons it is. */
async function explain(error) {
  const response = await fetch(CLIENT, { cache: 'no-store' }).catch(() => undefined)
  const said = response && !response.ok ? await response.text() : ''
  const why = said.includes('make client') ? 'not-built' : response?.status === 404 ? 'no-gateway' : 'other'
  find('panes').hidden = true
  find('missing').hidden = false
  find(why).hidden = false
  find('missing-error').textContent = `${CLIENT}: ${said.trim() || error.message}`
}

// ---- what the backend says of itself, past every device ----

function modelSays({ running, last }) {
  if (running) return ['running', running > 1 ? `producing ${running} answers` : 'producing']
  if (last === 'stoppedByClose') return ['stopped', 'stopped by the gateway']
  return last ? ['idle', 'finished its answer'] : ['idle', 'waiting for a question']
}

function showModel(state, text) {
  find('model').dataset.state = state
  const element = find('model-state')
  if (element.textContent !== text) element.textContent = text // Set again, it would be read out again.
}

async function pollStatus() {
  try {
    const response = await fetch('/demo/status', { signal: AbortSignal.timeout(5000) })
    if (!response.ok) throw new Error(`status ${response.status}`)
    const status = await response.json()
    showModel(...modelSays(status))
    find('model-chunks').textContent = `${status.chunks} chunks`
    find('model-counts').textContent = ` · ${status.finished} finished · ${status.stoppedByClose} stopped`
  } catch {
    showModel('away', 'cannot be reached')
  }
  setTimeout(pollStatus, document.hidden ? 5 * STATUS_INTERVAL : STATUS_INTERVAL)
}

pollStatus()
openPanes().catch(explain)
