import type { By, EndReason, Failure, Refused } from './protocol.js'

/** A command was refused, and nothing changed by it. */
export class RefusedError extends Error {
  override readonly name = 'RefusedError'
  /** `bad-request`, `conflict`, `busy`, `too-large`, ... (docs/protocol.md, `error`). */
  readonly code: string
  readonly retryable: boolean
  /** In seconds. */
  readonly retryAfter: number | undefined

  constructor(refused: Refused) {
    super(refused.message)
    this.code = refused.code
    this.retryable = refused.retryable
    this.retryAfter = refused.retryAfter
  }
}

/** The gateway closed the connection for good, or this client cannot speak with it. */
export class ClosedError extends Error {
  override readonly name = 'ClosedError'
  /** The close code (4500-4999), or 0. */
  readonly code: number

  constructor(message: string, code = 0) {
    super(message)
    this.code = code
  }
}

/** How a turn ended, for who follows it. */
export interface TurnEnd {
  readonly chatId: string
  readonly turn: string
  readonly reason: EndReason
  /** Who cancelled it. */
  readonly by?: By
  readonly error?: Failure
}

/** A turn ended otherwise than `complete` or `cancelled`: what its stream fails with. */
export class TurnError extends Error {
  override readonly name = 'TurnError'
  readonly turn: string
  /** `error`: the backend failed or broke off. `interrupted`: the gateway node that read it is gone. */
  readonly reason: EndReason
  /** `upstream-refused`, `upstream-cut-off`, ... (docs/protocol.md §5). */
  readonly code: string
  /** The backend's HTTP status, where it refused. */
  readonly status: number | undefined
  /** In seconds. */
  readonly retryAfter: number | undefined

  constructor(end: TurnEnd) {
    super(end.error?.message ?? `unable to finish the answer; its turn ended ${end.reason}`)
    this.turn = end.turn
    this.reason = end.reason
    this.code = end.error?.code ?? end.reason
    this.status = end.error?.status
    this.retryAfter = end.error?.retryAfter
  }
}

/**
 * What a stream fails with when reconnecting was given up. `useChat` tells a lost network from an error by this
 * very type and word, and can resume afterwards.
 */
export function networkError(): TypeError {
  return new TypeError('unable to reach the gateway; the network connection was lost')
}

/** Call back whoever listens: what it throws is its own, is reported as such, and ends nothing here. */
export function tell(callback: () => void): void {
  try {
    callback()
  } catch (error) {
    queueMicrotask(() => {
      throw error
    })
  }
}

/** What the SDK, like `fetch`, takes for "it was asked to stop". */
export function abortError(message: string): DOMException {
  return new DOMException(message, 'AbortError')
}
