import { describe, expect, test, vi } from 'vitest'
import { rememberCarrier, rememberedCarrier, watchPage } from '../src/page.js'

const BASE = new URL('http://gateway/')
const ALL = ['websocket', 'sse', 'long-poll'] as const

/** As much of a tab's storage as is used. */
function storage(): Pick<Storage, 'getItem' | 'setItem'> {
  const items = new Map<string, string>()
  return {
    getItem: (key) => items.get(key) ?? null,
    setItem: (key, value) => void items.set(key, value),
  }
}

describe('the carrier that worked', () => {
  test('is remembered for the tab, by gateway', () => {
    vi.stubGlobal('sessionStorage', storage())
    rememberCarrier(BASE, 'sse')
    expect(rememberedCarrier(BASE, ALL)).toBe('sse')
    expect(rememberedCarrier(new URL('http://other/'), ALL)).toBe('websocket')
  })

  test('is not used where it is not allowed', () => {
    vi.stubGlobal('sessionStorage', storage())
    rememberCarrier(BASE, 'sse')
    expect(rememberedCarrier(BASE, ['long-poll', 'websocket'])).toBe('long-poll')
  })

  test('is not known to a page that may store nothing', () => {
    vi.stubGlobal('sessionStorage', undefined)
    rememberCarrier(BASE, 'sse')
    expect(rememberedCarrier(BASE, ALL)).toBe('websocket')
  })

  test('is not known where storage is forbidden', () => {
    const forbidden = () => {
      throw new DOMException('no', 'SecurityError')
    }
    const before = Object.getOwnPropertyDescriptor(globalThis, 'sessionStorage')
    Object.defineProperty(globalThis, 'sessionStorage', { configurable: true, get: forbidden })
    try {
      rememberCarrier(BASE, 'sse')
      expect(rememberedCarrier(BASE, ALL)).toBe('websocket')
    } finally {
      if (before) Object.defineProperty(globalThis, 'sessionStorage', before)
      else Reflect.deleteProperty(globalThis, 'sessionStorage')
    }
  })

  test('is forgotten where storage is full', () => {
    const full = () => {
      throw new DOMException('full', 'QuotaExceededError')
    }
    vi.stubGlobal('sessionStorage', { ...storage(), setItem: full })
    rememberCarrier(BASE, 'sse')
    expect(rememberedCarrier(BASE, ALL)).toBe('websocket')
  })
})

describe('a page that is watched', () => {
  /** A page whose events the test fires. */
  function page(): { fire: (type: string) => void; document: EventTarget & { visibilityState: string } } {
    const target = new EventTarget()
    const document = Object.assign(new EventTarget(), { visibilityState: 'visible' })
    vi.stubGlobal('addEventListener', target.addEventListener.bind(target))
    vi.stubGlobal('removeEventListener', target.removeEventListener.bind(target))
    vi.stubGlobal('document', document)
    return { fire: (type) => void target.dispatchEvent(new Event(type)), document }
  }

  test.each(['online', 'offline', 'pageshow'])('tells %s, and stops when it is asked to', (type) => {
    const { fire } = page()
    const woke = vi.fn()
    const unwatch = watchPage(woke)
    fire(type)
    expect(woke).toHaveBeenCalledTimes(1)
    unwatch()
    fire(type)
    expect(woke).toHaveBeenCalledTimes(1)
  })

  test('tells that it is seen again, and not that it is hidden', () => {
    const { document } = page()
    const woke = vi.fn()
    const unwatch = watchPage(woke)
    const change = () => document.dispatchEvent(new Event('visibilitychange'))
    document.visibilityState = 'hidden'
    change()
    expect(woke).not.toHaveBeenCalled()
    document.visibilityState = 'visible'
    change()
    expect(woke).toHaveBeenCalledTimes(1)
    unwatch()
    change()
    expect(woke).toHaveBeenCalledTimes(1)
  })

  test('is none on a server', () => {
    vi.stubGlobal('addEventListener', undefined)
    expect(() => watchPage(() => {})()).not.toThrow()
  })

  test('has no document in a worker', () => {
    const { fire } = page()
    vi.stubGlobal('document', undefined)
    const woke = vi.fn()
    const unwatch = watchPage(woke)
    fire('online')
    unwatch()
    expect(woke).toHaveBeenCalledTimes(1)
  })
})
