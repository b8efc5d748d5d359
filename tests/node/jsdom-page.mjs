// A page for what runs in a browser, as globals: its window, document, storage and events are jsdom's, its fetch,
// streams and WebSocket Node's own, which are the web's. Import it before React and before the SDK.
import { JSDOM } from 'jsdom'

const { window } = new JSDOM('<!doctype html><body></body>', { url: 'http://127.0.0.1/', pretendToBeVisual: true })
const { fetch, ReadableStream, TextDecoderStream, TransformStream, WebSocket, AbortController } = globalThis
Object.assign(window, { fetch, ReadableStream, TextDecoderStream, TransformStream, WebSocket, AbortController })

let isOnline = true
Object.defineProperty(window.navigator, 'onLine', { get: () => isOnline })

const { document, location, navigator, sessionStorage } = window
const listening = ['addEventListener', 'removeEventListener', 'dispatchEvent'].map(name => [name, window[name].bind(window)])
const page = { window, document, location, navigator, sessionStorage, ...Object.fromEntries(listening) }
for (const [name, value] of Object.entries(page)) {
  // Some of these Node has as getters, which cannot be assigned to.
  Object.defineProperty(globalThis, name, { value, configurable: true, writable: true })
}
globalThis.AI_SDK_LOG_WARNINGS = false

/** What a browser tells a page whose network goes or comes back. No connection is touched by it: `cut` does that. */
export function setOnline(online) {
  isOnline = online
  window.dispatchEvent(new window.Event(online ? 'online' : 'offline'))
}

/** What a browser tells a page that comes to the front again, or out of its back-forward cache. */
export function wake(event) {
  const target = event === 'visibilitychange' ? document : window
  target.dispatchEvent(new window.Event(event))
}
