import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import {
  type Closing,
  type ConnectionState,
  closed,
  initialState,
  open,
  proven,
  rest,
  wake,
} from '../src/connection-state.js'
import type { CarrierName } from '../src/protocol.js'

const ALL: readonly CarrierName[] = ['websocket', 'sse', 'long-poll']
const BACKOFF = { backoffBaseMs: 500, backoffMaxMs: 10_000 }

type Input = (state: ConnectionState) => ConnectionState

/** A close, at 1000 ms, with the dice at one half. */
function loses(closing: Partial<Closing> = {}, carriers = ALL): Input {
  return (state) => closed(state, { code: 1006, reason: '', ...closing }, carriers, BACKOFF, 1_000, 0.5)
}

const timesOut = loses({ code: 0, timedOut: true })

describe('the dialogue', () => {
  type Step = [input: Input, then: Partial<ConnectionState>]
  const dialogues: Record<string, Step[]> = {
    'opens, works, is lost, comes back': [
      [open, { phase: 'opening', carrier: 'websocket' }],
      [proven, { phase: 'open', failures: 0 }],
      [loses(), { phase: 'waiting', carrier: 'websocket', until: 1_250, failures: 1 }],
      [open, { phase: 'opening', carrier: 'websocket' }],
      [proven, { phase: 'open', failures: 1, refusals: 0 }],
    ],
    'a greeting alone ends no backoff: who is closed after each waits ever longer': [
      [open, {}],
      [proven, {}],
      [loses(), { until: 1_250, failures: 1 }],
      [open, {}],
      [proven, {}],
      [loses(), { until: 1_500, failures: 2, carrier: 'websocket' }],
      [open, {}],
      [proven, {}],
      [loses(), { until: 2_000, failures: 3, carrier: 'websocket' }],
    ],
    'waits twice as long after each failure, up to the most': [
      [open, {}],
      [proven, {}],
      [loses(), { until: 1_250, failures: 1 }],
      [open, {}],
      [loses(), { until: 1_500, failures: 2, carrier: 'websocket', refusals: 1 }],
      [open, {}],
      [loses(), { phase: 'opening', carrier: 'sse', failures: 2 }],
      [timesOut, { phase: 'opening', carrier: 'long-poll', failures: 2 }],
      [timesOut, { phase: 'waiting', carrier: 'websocket', until: 2_000, failures: 3 }],
      [open, {}],
      [loses(), { until: 3_000 }],
      [open, {}],
      [loses(), { phase: 'opening', carrier: 'sse' }],
      [loses(), { phase: 'waiting', until: 5_000, carrier: 'sse', refusals: 1 }],
      [open, { phase: 'opening', carrier: 'sse' }],
      [timesOut, { phase: 'opening', carrier: 'long-poll' }],
      [timesOut, { phase: 'waiting', until: 6_000 }],
    ],
    'one that is swallowed is given up at once': [
      [open, {}],
      [timesOut, { phase: 'opening', carrier: 'sse', refusals: 0 }],
      [proven, { phase: 'open', carrier: 'sse', preferred: 'sse' }],
      [loses(), { phase: 'waiting', carrier: 'sse' }],
      [open, { phase: 'opening', carrier: 'sse' }],
    ],
    'one that is refused gets a second chance': [
      [open, {}],
      [loses(), { phase: 'waiting', carrier: 'websocket', refusals: 1 }],
      [open, {}],
      [loses(), { phase: 'opening', carrier: 'sse', refusals: 0 }],
    ],
    'a sign of the gateway forgets refusals': [
      [open, {}],
      [loses(), { refusals: 1 }],
      [open, {}],
      [proven, { refusals: 0 }],
      [loses(), { phase: 'waiting', refusals: 0 }],
      [open, {}],
      [loses(), { phase: 'waiting', carrier: 'websocket', refusals: 1 }],
    ],
    'the gateway says when to come back': [
      [open, {}],
      [proven, {}],
      [loses({ after: 70 }), { phase: 'waiting', until: 1_070, failures: 0, carrier: 'websocket' }],
    ],
    'a better one that works is taken over in the open': [
      [open, {}],
      [timesOut, {}],
      [proven, { carrier: 'sse' }],
      [
        (state) => proven(state, 'websocket'),
        { phase: 'open', carrier: 'websocket', preferred: 'websocket' },
      ],
    ],
    'rests, and begins again with what worked': [
      [open, {}],
      [timesOut, {}],
      [proven, { carrier: 'sse' }],
      [rest, { phase: 'idle', carrier: 'sse', preferred: 'sse', failures: 0 }],
      [loses(), { phase: 'idle' }],
      [open, { phase: 'opening', carrier: 'sse' }],
    ],
    'wakes from a wait, from the carrier that worked': [
      [open, {}],
      [proven, {}],
      [loses(), { failures: 1 }],
      [wake, { phase: 'opening', carrier: 'websocket', failures: 1, refusals: 0 }],
    ],
    'is closed for good by the gateway, whatever comes': [
      [open, {}],
      [loses({ code: 4500, reason: 'no' }), { phase: 'closed', code: 4500, reason: 'no' }],
      [open, { phase: 'closed' }],
      [wake, { phase: 'closed' }],
      [proven, { phase: 'closed' }],
      [rest, { phase: 'closed' }],
      [loses(), { phase: 'closed' }],
    ],
  }
  test.each(Object.entries(dialogues))('%s', (_, steps) => {
    let state = initialState('websocket')
    for (const [input, then] of steps) {
      state = input(state)
      expect(state).toMatchObject(then)
    }
  })

  test.each([
    [4499, 'waiting'],
    [4500, 'closed'],
    [4999, 'closed'],
    [5000, 'waiting'],
    [1000, 'waiting'],
    [4000, 'waiting'],
  ])('the close code %i leaves it %s', (code, phase) => {
    expect(loses({ code })(proven(initialState('websocket'))).phase).toBe(phase)
  })

  test('what is final for another reason than its code is final', () => {
    expect(loses({ code: 0, final: true })(open(initialState('sse'))).phase).toBe('closed')
  })

  test('a carrier that is the only one is tried again after a wait', () => {
    const next = closed(
      open(initialState('sse')),
      { code: 0, reason: '', timedOut: true },
      ['sse'],
      BACKOFF,
      0,
      0.9,
    )
    expect(next).toMatchObject({ phase: 'waiting', carrier: 'sse', until: 450 })
  })
})

describe('whatever happens', () => {
  const closing = fc.record(
    {
      code: fc.constantFrom(0, 1000, 1006, 4000, 4001, 4499, 5000),
      reason: fc.constant(''),
      timedOut: fc.boolean(),
      after: fc.nat(5_000),
    },
    { requiredKeys: ['code', 'reason'] },
  )
  const final = fc.record({ code: fc.integer({ min: 4500, max: 4999 }), reason: fc.constant('') })
  type Event =
    | { is: 'open' | 'proven' | 'rest' | 'wake' }
    | { is: 'closed'; closing: Closing; now: number; jitter: number }
  const jitter = fc.double({ min: 0, max: 1, maxExcluded: true, noNaN: true })
  const event: fc.Arbitrary<Event> = fc.oneof(
    fc.record({ is: fc.constantFrom('open', 'proven', 'rest', 'wake') }),
    { arbitrary: fc.record({ is: fc.constant('closed'), closing, now: fc.nat(100_000), jitter }), weight: 3 },
  )
  const carriers = fc.shuffledSubarray([...ALL], { minLength: 1 })
  const inputs = { open, proven: (state: ConnectionState) => proven(state), rest, wake }

  function apply(state: ConnectionState, event: Event, allowed: readonly CarrierName[]): ConnectionState {
    if (event.is !== 'closed') return inputs[event.is](state)
    return closed(state, event.closing, allowed, BACKOFF, event.now, event.jitter)
  }

  test('it never spins: a close leads to a wait or to another carrier, and those run out', () => {
    fc.assert(
      fc.property(carriers, fc.array(event, { maxLength: 60 }), (allowed, events) => {
        let state = initialState(allowed[0] as CarrierName)
        let attemptsAtOnce = 0
        for (const one of events) {
          const before = state
          state = apply(state, one, allowed)
          expect(allowed).toContain(state.carrier)
          expect(allowed).toContain(state.preferred)
          if (one.is !== 'closed') {
            attemptsAtOnce = 0
            continue
          }
          if (before.phase !== 'opening' && before.phase !== 'open') {
            expect(state).toBe(before)
            continue
          }
          if (state.phase === 'opening') {
            expect(state.carrier).not.toBe(before.carrier)
            attemptsAtOnce += 1
            expect(attemptsAtOnce).toBeLessThan(allowed.length)
          } else {
            expect(state.phase).toBe('waiting')
            expect(state.until).toBeGreaterThanOrEqual(one.now)
            expect(state.until - one.now).toBeLessThanOrEqual(
              Math.max(BACKOFF.backoffMaxMs, one.closing.after ?? 0),
            )
            attemptsAtOnce = 0
          }
        }
      }),
    )
  })

  test('every carrier is tried in a round, the one that worked first, and then there is a wait', () => {
    const bad = fc.array(fc.boolean(), { minLength: 2 * ALL.length, maxLength: 2 * ALL.length })
    fc.assert(
      fc.property(carriers, fc.nat(), bad, (allowed, which, swallowed) => {
        const worked = allowed[which % allowed.length] as CarrierName
        let state = open(rest(proven(initialState(allowed[0] as CarrierName), worked)))
        const tried: CarrierName[] = []
        for (const timedOut of swallowed) {
          tried.push(state.carrier)
          state = closed(state, { code: 1006, reason: '', timedOut }, allowed, BACKOFF, 0, 0.5)
          if (state.phase === 'waiting' && state.refusals === 0) break
          state = open(state)
        }
        const others = allowed.filter((carrier) => carrier !== worked)
        expect([...new Set(tried)]).toEqual([worked, ...others])
        expect(state).toMatchObject({ phase: 'waiting', carrier: worked })
      }),
    )
  })

  test('the one that worked last is preferred', () => {
    fc.assert(
      fc.property(fc.array(event, { maxLength: 40 }), (events) => {
        let state = initialState('websocket')
        let worked: CarrierName = 'websocket'
        for (const one of events) {
          if (one.is === 'proven') worked = state.carrier
          state = apply(state, one, ALL)
          expect(state.preferred).toBe(worked)
        }
      }),
    )
  })

  test('final is final', () => {
    fc.assert(
      fc.property(fc.array(event, { maxLength: 10 }), final, fc.array(event), (before, last, after) => {
        const events = [...before, { is: 'open' } as const]
        let state = events.reduce((state, one) => apply(state, one, ALL), initialState('websocket'))
        state = closed(state, last, ALL, BACKOFF, 0, 0)
        expect(state).toMatchObject({ phase: 'closed', code: last.code })
        for (const one of after) {
          state = apply(state, one, ALL)
          expect(state.phase).toBe('closed')
        }
      }),
    )
  })

  test('news of the network only shortens: it ends a wait, and adds nothing to any backoff', () => {
    fc.assert(
      fc.property(fc.array(event, { maxLength: 40 }), (events) => {
        let state = initialState('websocket')
        for (const one of events) {
          const woken = wake(state)
          if (state.phase === 'waiting') {
            expect(woken).toEqual({ ...state, phase: 'opening', carrier: state.preferred, refusals: 0 })
          } else expect(woken).toBe(state)
          state = apply(state, one, ALL)
        }
      }),
    )
  })

  test('the wait is drawn from zero to a longest one that doubles', () => {
    fc.assert(
      fc.property(fc.nat(40), jitter, fc.nat(), (failures, dice, now) => {
        const state = { ...proven(initialState('sse')), failures }
        const next = closed(state, { code: 1006, reason: '' }, ALL, BACKOFF, now, dice)
        expect(next.until).toBe(now + dice * Math.min(10_000, 500 * 2 ** failures))
        expect(next.failures).toBe(failures + 1)
      }),
    )
  })
})
