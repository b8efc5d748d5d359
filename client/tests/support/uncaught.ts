import { vi } from 'vitest'

/**
 * What is thrown into nowhere from now on, as a page's `onerror` sees it. Vitest would fail the whole run for it.
 *
 * Of what is thrown in a microtask; nothing here throws from anywhere else.
 */
export function watchUncaught(): string[] {
  const messages: string[] = []
  const queue = globalThis.queueMicrotask
  vi.stubGlobal('queueMicrotask', (callback: () => void) =>
    queue(() => {
      try {
        callback()
      } catch (error) {
        messages.push((error as Error).message)
      }
    }),
  )
  return messages
}
