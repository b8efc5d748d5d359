import fc from 'fast-check'
import { afterEach, beforeEach, describe, expect, test, vi } from 'vitest'
import { Commands } from '../src/commands.js'
import { RefusedError } from '../src/errors.js'
import type { CancelCommand, Refused, SendCommand } from '../src/protocol.js'

beforeEach(() => void vi.useFakeTimers())
afterEach(() => void vi.useRealTimers())

/** A carrier that is there or not, and what was given to it, as `send a` or `cancel s` or `cancel s a`. */
class Carrying {
  isOpen = true
  given: (SendCommand | CancelCommand)[] = []
  onGiven: ((command: SendCommand | CancelCommand) => void) | undefined
  readonly commands = new Commands(
    (command) => {
      if (this.isOpen) {
        this.onGiven?.(command)
        this.given.push(command)
      }
      return this.isOpen
    },
    { giveUpMs: 300_000, retryMs: 30_000 },
  )

  send(turn: string, session = 's'): Promise<unknown> {
    return this.commands.send({ session, turn, body: {} })
  }

  cancel(turn?: string, session = 's'): Promise<unknown> {
    return this.commands.cancel(session, turn)
  }

  get names(): string[] {
    return this.given.map(({ type, session, turn }) =>
      type === 'send' ? `send ${turn}` : name(session, turn),
    )
  }

  /** What was given since this was asked last. */
  take(): string[] {
    const { names } = this
    this.given = []
    return names
  }

  accept({ id, session, turn }: SendCommand | CancelCommand): void {
    this.commands.answered({ type: 'accepted', id, session, turn: turn as string, cursor: 'c' })
  }

  confirm({ id }: SendCommand | CancelCommand): void {
    this.commands.answered({ type: 'cancelled', id, turns: [{ turn: 'x', result: 'cancelled' }] })
  }

  refuse({ id }: SendCommand | CancelCommand, refused: Partial<Refused> = {}): void {
    this.commands.answered({ type: 'error', id, code: 'busy', message: 'no', retryable: false, ...refused })
  }

  reconnect(): void {
    this.commands.disconnected()
    this.commands.giveAll()
  }
}

function name(session: string, turn: string | undefined): string {
  return turn === undefined ? `cancel ${session}` : `cancel ${session} ${turn}`
}

/** What became of a promise, without waiting for it. */
function outcome(promise: Promise<unknown>): { is?: string; value?: unknown } {
  const seen: { is?: string; value?: unknown } = {}
  promise.then(
    (value) => Object.assign(seen, { is: 'resolved', value }),
    (value) => Object.assign(seen, { is: 'rejected', value }),
  )
  return seen
}

const flush = () => vi.advanceTimersByTimeAsync(0)

test('a command is given once on a connection, and resolved by its reply', async () => {
  const carrying = new Carrying()
  const sent = outcome(carrying.send('a'))
  const cancelled = outcome(carrying.cancel('a'))
  carrying.commands.giveAll()
  expect(carrying.names).toEqual(['send a', 'cancel s a'])
  const [send, cancel] = carrying.given as [SendCommand, CancelCommand]
  carrying.confirm(cancel)
  carrying.accept(send)
  await flush()
  expect(sent).toMatchObject({ is: 'resolved', value: { turn: 'a', cursor: 'c' } })
  expect(cancelled).toEqual({ is: 'resolved', value: [{ turn: 'x', result: 'cancelled' }] })
  expect(carrying.commands.isEmpty).toBe(true)
})

test('what is asked for without a carrier waits for one: cancels first, each kind in its order', () => {
  const carrying = new Carrying()
  carrying.isOpen = false
  void carrying.send('a')
  void carrying.cancel('b')
  void carrying.send('c')
  void carrying.cancel('a')
  carrying.isOpen = true
  expect(carrying.names).toEqual([])
  carrying.commands.giveAll()
  expect(carrying.take()).toEqual(['cancel s b', 'cancel s a', 'send a', 'send c'])
})

test('what was not answered is given again on the next connection, and what was answered is not', async () => {
  const carrying = new Carrying()
  void carrying.send('a')
  void carrying.send('b')
  const [first, second] = carrying.given as [SendCommand, SendCommand]
  carrying.accept(second)
  carrying.given = []
  carrying.reconnect()
  expect(carrying.given).toEqual([first])
  carrying.commands.giveAll()
  expect(carrying.given).toEqual([first])
})

describe('a cancel of all that runs', () => {
  test('holds back a send that was asked for after it, until it is answered', () => {
    const carrying = new Carrying()
    void carrying.send('before')
    void carrying.cancel()
    void carrying.send('after')
    void carrying.send('elsewhere', 'other')
    expect(carrying.names).toEqual(['send before', 'cancel s', 'send elsewhere'])
    carrying.confirm(carrying.given[1] as CancelCommand)
    expect(carrying.names.at(-1)).toBe('send after')
  })

  test('holds nothing back that was asked for before it, though it is given first', () => {
    const carrying = new Carrying()
    carrying.isOpen = false
    void carrying.send('before')
    void carrying.cancel()
    void carrying.send('after')
    carrying.isOpen = true
    carrying.commands.giveAll()
    expect(carrying.take()).toEqual(['cancel s', 'send before'])
  })

  test('lets it go when it is refused', async () => {
    const carrying = new Carrying()
    const cancelled = outcome(carrying.cancel())
    void carrying.send('after')
    carrying.refuse(carrying.given[0] as CancelCommand)
    await flush()
    expect(carrying.take()).toEqual(['cancel s', 'send after'])
    expect(cancelled.value).toBeInstanceOf(RefusedError)
  })

  test('holds it back on the next connection too', () => {
    const carrying = new Carrying()
    void carrying.cancel()
    void carrying.send('after')
    carrying.take()
    carrying.reconnect()
    expect(carrying.take()).toEqual(['cancel s'])
  })

  test('of one turn holds nothing back', () => {
    const carrying = new Carrying()
    void carrying.cancel('a')
    void carrying.send('a')
    expect(carrying.take()).toEqual(['cancel s a', 'send a'])
  })
})

describe('a refusal', () => {
  test.each(['store-unavailable', 'draining', 'rate-limited'])(
    'that passes, %s, is tried again',
    async (code) => {
      const carrying = new Carrying()
      const sent = outcome(carrying.send('a'))
      carrying.refuse(carrying.given[0] as SendCommand, { code, retryable: true, retryAfter: 4 })
      carrying.take()
      await vi.advanceTimersByTimeAsync(1_999)
      carrying.commands.giveAll()
      expect(carrying.take()).toEqual([])
      await vi.advanceTimersByTimeAsync(2_001)
      expect(carrying.names).toEqual(['send a'])
      expect(sent).toEqual({})
      carrying.accept(carrying.given[0] as SendCommand)
      await flush()
      expect(sent.is).toBe('resolved')
    },
  )

  test('that passes is tried after a second, where it does not say', async () => {
    const carrying = new Carrying()
    void carrying.send('a')
    carrying.refuse(carrying.given[0] as SendCommand, { code: 'draining', retryable: true })
    await vi.advanceTimersByTimeAsync(499)
    expect(carrying.names).toHaveLength(1)
    await vi.advanceTimersByTimeAsync(501)
    expect(carrying.names).toHaveLength(2)
  })

  test.each([
    { code: 'rate-limited', least: 4, most: 7 },
    { code: 'draining', least: 31, most: 61 }, // the node ends, and what comes after it takes the send
  ])('that does not pass in time, $code, is told', async ({ code, least, most }) => {
    const carrying = new Carrying()
    const sent = outcome(carrying.send('a'))
    for (let tries = 0; tries < 100 && !sent.is; tries += 1) {
      carrying.refuse(carrying.given.at(-1) as SendCommand, { code, retryable: true, retryAfter: 10 })
      await vi.advanceTimersByTimeAsync(10_000)
    }
    expect(sent).toMatchObject({ is: 'rejected', value: { code, retryAfter: 10 } })
    expect(carrying.given.length).toBeGreaterThanOrEqual(least)
    expect(carrying.given.length).toBeLessThanOrEqual(most)
    expect(carrying.commands.isEmpty).toBe(true)
  })

  test.each([
    { code: 'busy', retryable: true },
    { code: 'conflict', retryable: false },
    { code: 'draining', retryable: false },
  ])('that is for a person, $code, is told at once', async (refused) => {
    const carrying = new Carrying()
    const sent = outcome(carrying.send('a'))
    carrying.refuse(carrying.given[0] as SendCommand, { ...refused, message: 'unable to', retryAfter: 3 })
    await flush()
    expect(sent.value).toBeInstanceOf(RefusedError)
    expect(sent.value).toMatchObject({ ...refused, message: 'unable to', retryAfter: 3 })
  })

  test('that would not pass in time is told at once', async () => {
    const carrying = new Carrying()
    const sent = outcome(carrying.send('a'))
    carrying.refuse(carrying.given[0] as SendCommand, {
      code: 'rate-limited',
      retryable: true,
      retryAfter: 3_600,
    })
    await flush()
    expect(sent).toMatchObject({ is: 'rejected', value: { code: 'rate-limited', retryAfter: 3_600 } })
    expect(vi.getTimerCount()).toBe(0)
  })

  test('that is waited for is not given on a new connection before its time', async () => {
    const carrying = new Carrying()
    void carrying.send('a')
    const refused = { code: 'rate-limited', retryable: true, retryAfter: 4 } as const
    carrying.refuse(carrying.given[0] as SendCommand, refused)
    carrying.take()
    carrying.reconnect()
    expect(carrying.take()).toEqual([])
    await vi.advanceTimersByTimeAsync(4_000)
    expect(carrying.take()).toEqual(['send a'])
  })

  test('of a node that stops is of no interest on the next connection, and forgotten by the next refusal', async () => {
    const carrying = new Carrying()
    void carrying.send('a')
    const refused = { retryable: true, retryAfter: 4 } as const
    carrying.refuse(carrying.given[0] as SendCommand, { ...refused, code: 'draining' })
    carrying.take()
    carrying.reconnect()
    expect(carrying.names).toEqual(['send a'])
    carrying.refuse(carrying.given[0] as SendCommand, { ...refused, code: 'rate-limited' })
    carrying.take()
    carrying.reconnect()
    expect(carrying.take()).toEqual([])
    await vi.advanceTimersByTimeAsync(4_000)
    expect(carrying.take()).toEqual(['send a'])
    expect(vi.getTimerCount()).toBe(0)
  })
})

test('a turn that began was accepted, whatever became of the reply', async () => {
  const carrying = new Carrying()
  const sent = outcome(carrying.send('a'))
  const other = outcome(carrying.send('a', 'other'))
  const cancelled = outcome(carrying.cancel('a'))
  const [send] = carrying.given as [SendCommand]
  carrying.commands.began('s', 'b', 'c1')
  carrying.commands.began('s', 'a', 'c2')
  await flush()
  const accepted = { type: 'accepted', id: send.id, session: 's', turn: 'a', cursor: 'c2' }
  expect(sent).toEqual({ is: 'resolved', value: accepted })
  expect([other, cancelled]).toEqual([{}, {}])
  carrying.accept(send) // late, and of nobody's interest
  carrying.take()
  carrying.reconnect()
  expect(carrying.take()).toEqual(['cancel s a', 'send a'])
})

test('a reply to nothing is nothing', () => {
  const carrying = new Carrying()
  carrying.commands.answered({ type: 'error', code: 'bad-request', message: 'no id', retryable: false })
  carrying.commands.answered({ type: 'cancelled', id: 'nobody', turns: [] })
  expect(carrying.commands.isEmpty).toBe(true)
})

test('given up, all fail, and no retry is left', async () => {
  const carrying = new Carrying()
  const sent = outcome(carrying.send('a'))
  const cancelled = outcome(carrying.cancel())
  carrying.refuse(carrying.given[0] as SendCommand, { code: 'draining', retryable: true })
  carrying.take()
  carrying.commands.fail(new TypeError('gone'))
  await vi.advanceTimersByTimeAsync(60_000)
  expect([sent.value, cancelled.value]).toEqual([new TypeError('gone'), new TypeError('gone')])
  expect(carrying.take()).toEqual([])
  expect(vi.getTimerCount()).toBe(0)
})

test('which turns of a session were asked for and not answered', () => {
  const carrying = new Carrying()
  void carrying.send('a')
  void carrying.send('b')
  void carrying.send('c', 'other')
  void carrying.cancel('d')
  carrying.accept(carrying.given[0] as SendCommand)
  expect(carrying.commands.unanswered('s')).toEqual(['b'])
})

test('whatever is lost, each is answered once, and no send overtakes a cancel of all before it', async () => {
  const step = fc.oneof(
    fc.record({ is: fc.constantFrom('send', 'cancel', 'cut', 'open', 'shut') }),
    fc.record({ is: fc.constant('reply'), which: fc.nat(20) }),
  )
  const property = fc.asyncProperty(fc.array(step, { maxLength: 40 }), async (steps) => {
    const carrying = new Carrying()
    const asked: ReturnType<typeof outcome>[] = []
    const cancels: string[] = []
    const cancelsBefore = new Map<string, number>()
    const answered = new Set<string>()
    carrying.onGiven = ({ id, type, turn }) => {
      expect(answered).not.toContain(id)
      if (type === 'cancel') {
        if (!cancels.includes(id)) cancels.push(id) // they are given in the order they were asked for
      } else {
        const before = cancels.slice(0, cancelsBefore.get(turn))
        expect(before).toHaveLength(cancelsBefore.get(turn) as number)
        for (const cancel of before) expect(answered).toContain(cancel)
      }
    }
    const reply = (command: SendCommand | CancelCommand) => {
      answered.add(command.id)
      if (command.type === 'send') carrying.accept(command)
      else carrying.confirm(command)
    }
    let cancelsAsked = 0
    for (const one of steps) {
      if (one.is === 'send') {
        const turn = `t${asked.length}`
        cancelsBefore.set(turn, cancelsAsked)
        asked.push(outcome(carrying.send(turn)))
      } else if (one.is === 'cancel') {
        cancelsAsked += 1
        asked.push(outcome(carrying.cancel()))
      } else if ('which' in one) {
        const [command] = carrying.given.splice(one.which % Math.max(1, carrying.given.length), 1)
        if (command) reply(command)
      } else {
        if (one.is !== 'cut') carrying.isOpen = one.is === 'open'
        if (one.is !== 'open') {
          carrying.given = []
          carrying.commands.disconnected()
        }
        if (carrying.isOpen) carrying.commands.giveAll()
      }
    }
    carrying.isOpen = true
    carrying.given = []
    carrying.reconnect()
    for (let command = carrying.given.shift(); command; command = carrying.given.shift()) reply(command)
    await flush()
    expect(asked.map(({ is }) => is)).toEqual(asked.map(() => 'resolved'))
    expect(carrying.commands.isEmpty).toBe(true)
  })
  await fc.assert(property)
})
