/**
 * How a connection is made, lost and made again: pure, with the clock and the dice as arguments.
 *
 * ```
 * idle -> opening -> open -> waiting -> opening ...        (closed: final)
 *            |  ^                ^
 *            v  |                |
 *         next carrier ----------+  (none left: a round has failed)
 * ```
 *
 * Rule 1: no sign of the gateway before the carrier's deadline, or two closes before one = the next carrier, at once.
 * Rule 2: a carrier that has worked is where the next attempt begins; a failed round begins there again.
 * Rule 3: only closes grow the backoff; news of the network (`wake`) ends a wait and never adds one.
 */
import { type CarrierName, FIRST_FINAL_CLOSE_CODE, LAST_CLOSE_CODE } from './protocol.js'
import type { Timing } from './timing.js'

/** Closes before any sign of the gateway after which a carrier is given up. */
const REFUSALS = 2

export interface ConnectionState {
  readonly phase: 'idle' | 'opening' | 'open' | 'waiting' | 'closed'
  /** The carrier in use, or to be tried next. */
  readonly carrier: CarrierName
  /** Where a round begins: the one that worked last. */
  readonly preferred: CarrierName
  /** Closes of this carrier, in a row, before a sign of the gateway. */
  readonly refusals: number
  /** Failed attempts since the last one that worked. */
  readonly failures: number
  /** When to try again, in `waiting`. */
  readonly until: number
  /** Why it is `closed`. */
  readonly reason?: string | undefined
  readonly code?: number
}

/** How a carrier ended. */
export interface Closing {
  /** A WebSocket close code; none is 0. */
  readonly code?: number
  /** Told when it is closed for good. */
  readonly reason?: string
  /** Nothing came until its deadline: something on the way swallows it. */
  readonly timedOut?: boolean
  /** The gateway asked to come back after so many milliseconds. */
  readonly after?: number
  /** It will never work: nobody should try again. */
  readonly final?: boolean
}

export type Backoff = Pick<Timing, 'backoffBaseMs' | 'backoffMaxMs'>

/** @param preferred - The carrier that is known to work here, or the best one. */
export function initialState(preferred: CarrierName): ConnectionState {
  return { phase: 'idle', carrier: preferred, preferred, refusals: 0, failures: 0, until: 0 }
}

/** There is something to be connected for, or the wait is over. */
export function open(state: ConnectionState): ConnectionState {
  return state.phase === 'idle' || state.phase === 'waiting' ? { ...state, phase: 'opening' } : state
}

/** The gateway has shown itself on this carrier. */
export function proven(state: ConnectionState, carrier: CarrierName = state.carrier): ConnectionState {
  if (state.phase === 'closed') return state
  return { ...state, phase: 'open', carrier, preferred: carrier, refusals: 0 }
}

/** There is nothing to be connected for. */
export function rest(state: ConnectionState): ConnectionState {
  return state.phase === 'closed' ? state : initialState(state.preferred)
}

/** Something says that the network may be back: try now, from the carrier that worked. */
export function wake(state: ConnectionState): ConnectionState {
  if (state.phase !== 'waiting') return state
  return { ...state, phase: 'opening', carrier: state.preferred, refusals: 0 }
}

/**
 * The connection ended, or could not be made.
 *
 * @param carriers - Those allowed, best first.
 * @param jitter - In [0, 1).
 */
export function closed(
  state: ConnectionState,
  closing: Closing,
  carriers: readonly CarrierName[],
  backoff: Backoff,
  now: number,
  jitter: number,
): ConnectionState {
  if (state.phase !== 'opening' && state.phase !== 'open') return state
  const { code = 0, reason } = closing
  if (closing.final || (code >= FIRST_FINAL_CLOSE_CODE && code <= LAST_CLOSE_CODE)) {
    return { ...state, phase: 'closed', code, reason }
  }
  if (closing.after !== undefined) return { ...state, phase: 'waiting', until: now + closing.after }
  const longest = Math.min(backoff.backoffMaxMs, backoff.backoffBaseMs * 2 ** state.failures)
  // Full jitter: a thousand devices that lost the same node do not come back in the same moment.
  const waiting = { phase: 'waiting', until: now + jitter * longest, failures: state.failures + 1 } as const
  if (state.phase === 'open') return { ...state, ...waiting, refusals: 0 }
  const refusals = state.refusals + 1
  if (!closing.timedOut && refusals < REFUSALS) return { ...state, ...waiting, refusals }
  const next = after(state, carriers)
  if (next === state.preferred) return { ...state, ...waiting, carrier: next, refusals: 0 }
  return { ...state, phase: 'opening', carrier: next, refusals: 0 }
}

/** Which carrier comes next in this round; the preferred one when the round is over. */
function after(state: ConnectionState, carriers: readonly CarrierName[]): CarrierName {
  const order = [state.preferred, ...carriers.filter((carrier) => carrier !== state.preferred)]
  return order[order.indexOf(state.carrier) + 1] ?? state.preferred
}
