/** What a browser's page knows: when the network may be back, and which carrier worked in this tab. Elsewhere: nothing. */
import type { CarrierName } from './protocol.js'

const WAKING = ['online', 'offline', 'pageshow'] as const
const KEY = 'session-gateway:carrier:'

/** Call back when the page wakes up or its network changes. Returns the end of it. */
export function watchPage(woke: () => void): () => void {
  if (typeof globalThis.addEventListener !== 'function') return () => {}
  const page = globalThis.document
  const seen = () => page?.visibilityState === 'visible' && woke()
  for (const type of WAKING) globalThis.addEventListener(type, woke)
  page?.addEventListener('visibilitychange', seen)
  return () => {
    for (const type of WAKING) globalThis.removeEventListener(type, woke)
    page?.removeEventListener('visibilitychange', seen)
  }
}

/** The carrier that worked last in this tab, if it is allowed; else the best one. */
export function rememberedCarrier(base: URL, carriers: readonly CarrierName[]): CarrierName {
  const remembered = storage()?.getItem(KEY + base.href)
  return carriers.find((carrier) => carrier === remembered) ?? (carriers[0] as CarrierName)
}

export function rememberCarrier(base: URL, carrier: CarrierName): void {
  try {
    storage()?.setItem(KEY + base.href, carrier)
  } catch {
    // Full, or forbidden: it is found out again after the next reload.
  }
}

/** A page may be forbidden to have any, which throws. */
function storage(): Storage | undefined {
  try {
    return globalThis.sessionStorage
  } catch {
    return undefined
  }
}
