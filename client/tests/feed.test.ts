import fc from 'fast-check'
import { afterEach, beforeEach, describe, expect, test, vi } from 'vitest'
import { type Begin, SessionFeed, type SessionListener } from '../src/feed.js'
import type { Attached, ResyncReason, SessionRecord } from '../src/protocol.js'
import { type AskedPlace, Journal } from './support/journal.js'
import { Rig } from './support/rig.js'

/** Notes what it is told, in one line of words. */
class Notes implements SessionListener {
  readonly all: string[] = []

  attached({ offset, last, resync }: Attached): void {
    this.all.push(`attached ${offset}/${last}${resync ? ` ${resync}` : ''}`)
  }

  record({ offset }: SessionRecord): void {
    this.all.push(String(offset))
  }

  caughtUp(): void {
    this.all.push('caught up')
  }

  reset(reason: ResyncReason): void {
    this.all.push(`reset ${reason}`)
  }

  failed({ message }: Error): void {
    this.all.push(`failed ${message}`)
  }
}

/** A feed and the journal that it reads, without anything in between. */
class Reading {
  readonly journal = new Journal()
  readonly feed = new SessionFeed('s')

  constructor(count = 0) {
    if (count) this.journal.start('t')
    for (let offset = 2; offset <= count; offset += 1) this.journal.chunk('t')
  }

  join(begin: Begin, isPatient = true): Notes {
    const notes = new Notes()
    this.feed.add(notes, begin, isPatient)
    return notes
  }

  /** The gateway answers an attach; returns where the feed wants to go instead. */
  answer(place: AskedPlace): AskedPlace | undefined {
    return this.feed.attached(this.journal.attach(place).attached, place)
  }

  push(...offsets: number[]): void {
    for (const offset of offsets) this.feed.record(this.journal.at(offset) as SessionRecord, 1)
  }
}

describe('one listener', () => {
  test('gets what follows its place, each once, and is told when it has all there was', () => {
    const reading = new Reading(2)
    const notes = reading.join({ from: 'start' })
    expect(reading.feed.wanted()).toEqual({})
    reading.answer({})
    reading.push(1, 2)
    reading.journal.chunk('t')
    reading.push(3, 3, 2)
    expect(notes.all).toEqual(['attached 0/2', '1', '2', 'caught up', '3'])
  })

  test('has caught up at once where nothing is left', () => {
    const reading = new Reading()
    const notes = reading.join({ from: 'running' })
    expect(reading.feed.wanted()).toEqual({ from: 'running' })
    reading.answer({ from: 'running' })
    expect(notes.all).toEqual(['attached 0/0', 'caught up'])
    expect(reading.feed.isCaughtUp).toBe(true)
  })

  test('begins after its own cursor', () => {
    const reading = new Reading(3)
    const notes = reading.join({ after: '1.2' })
    expect(reading.feed.wanted()).toEqual({ after: '1.2' })
    reading.answer({ after: '1.2' })
    reading.push(3)
    expect(notes.all).toEqual(['attached 2/3', '3', 'caught up'])
  })

  test('begins with its own turn, and asks for no place', () => {
    const reading = new Reading(2)
    const notes = reading.join({ turn: 'mine' })
    expect(reading.feed.wanted()).toBeUndefined()
    reading.journal.start('mine')
    reading.feed.follow('1.1')
    reading.push(2, 3)
    expect(notes.all).toEqual(['3', 'caught up'])
  })

  test('after a lost connection goes on from the last record had, and is not told', () => {
    const reading = new Reading(3)
    const notes = reading.join({ from: 'start' })
    reading.answer({})
    reading.push(1, 2)
    reading.feed.disconnected()
    expect(reading.feed.wanted()).toEqual({ after: '1.2' })
    reading.answer({ after: '1.2' })
    reading.push(3)
    expect(notes.all).toEqual(['attached 0/3', '1', '2', '3', 'caught up'])
  })

  test('is reset when its place is gone, and told all that is kept', () => {
    const reading = new Reading(4)
    const notes = reading.join({ from: 'start' })
    reading.answer({})
    reading.push(1)
    reading.feed.disconnected()
    reading.journal.trim(2)
    reading.answer({ after: '1.1' })
    reading.push(3, 4)
    expect(notes.all).toEqual([
      'attached 0/4',
      '1',
      'reset trimmed',
      'attached 2/4 trimmed',
      '3',
      '4',
      'caught up',
    ])
  })

  test('is reset when the gateway says so, and asks from the start', () => {
    const reading = new Reading(1)
    const notes = reading.join({ from: 'running' })
    reading.answer({ from: 'running' })
    reading.push(1)
    reading.feed.lost('too-far-behind')
    expect(reading.feed.isAttached).toBe(false)
    expect(reading.feed.wanted()).toEqual({})
    reading.answer({})
    reading.push(1)
    expect(notes.all.slice(-4)).toEqual(['reset too-far-behind', 'attached 0/1', '1', 'caught up'])
  })

  test('knows nothing of how far the journal goes that it was told is gone', () => {
    const reading = new Reading(3)
    const notes = reading.join({ from: 'start' })
    reading.answer({})
    reading.feed.lost('epoch-changed')
    reading.feed.remove(notes)
    reading.journal.forget()
    reading.join({ turn: 'mine' })
    reading.journal.start('mine')
    reading.feed.follow('2.0')
    reading.push(1)
    expect(reading.feed).toMatchObject({ offset: 1, last: 1, isCaughtUp: true })
  })

  test('that waits for its own turn is reset too: the turn may stand before what is told from here on', () => {
    const reading = new Reading()
    const notes = reading.join({ turn: 'mine' })
    reading.feed.lost('trimmed')
    expect(notes.all).toEqual(['reset trimmed'])
    expect(reading.feed.wanted()).toEqual({})
  })

  test('gets nothing more when it has left', () => {
    const reading = new Reading(2)
    const notes = reading.join({ from: 'start' })
    reading.answer({})
    reading.push(1)
    reading.feed.remove(notes)
    expect(reading.feed.isEmpty).toBe(true)
    reading.push(2)
    reading.feed.fail(new Error('late'), 'all')
    expect(notes.all).toEqual(['attached 0/2', '1'])
  })
})

describe('several listeners', () => {
  test('one that needs earlier records moves the place back, and the others do not get them again', () => {
    const reading = new Reading(3)
    const early = reading.join({ after: '1.2' })
    reading.answer({ after: '1.2' })
    reading.push(3)
    const late = reading.join({ from: 'start' })
    expect(reading.feed.wanted()).toEqual({})
    expect(reading.answer({})).toBeUndefined()
    reading.push(1, 2, 3)
    expect(early.all).toEqual(['attached 2/3', '3', 'caught up'])
    expect(late.all).toEqual(['attached 0/3', '1', '2', '3', 'caught up'])
  })

  test('one that is ahead does not take the place with it', () => {
    const reading = new Reading(5)
    const behind = reading.join({ from: 'start' })
    reading.answer({})
    reading.push(1)
    const ahead = reading.join({ after: '1.4' })
    expect(reading.answer({ after: '1.4' })).toEqual({ after: '1.1' })
    reading.push(5)
    expect(reading.answer({ after: '1.1' })).toBeUndefined()
    reading.push(2, 3, 4, 5)
    expect(behind.all).toEqual(['attached 0/5', '1', '2', '3', '4', '5', 'caught up'])
    expect(ahead.all).toEqual(['attached 4/5', '5', 'caught up'])
  })

  test('a connection that is lost before the place is back goes on from where the last one is', () => {
    const reading = new Reading(5)
    const behind = reading.join({ from: 'start' })
    reading.answer({})
    reading.push(1)
    reading.join({ after: '1.4' })
    expect(reading.answer({ after: '1.4' })).toEqual({ after: '1.1' })
    reading.push(5)
    reading.feed.disconnected()
    expect(reading.feed.wanted()).toEqual({ after: '1.1' })
    reading.answer({ after: '1.1' })
    reading.push(2, 3, 4, 5)
    expect(behind.all).toEqual(['attached 0/5', '1', '2', '3', '4', '5', 'caught up'])
  })

  test('one between the place and a new one keeps its place too', () => {
    const reading = new Reading(9)
    const first = reading.join({ from: 'start' })
    reading.answer({})
    reading.push(1)
    const between = reading.join({ after: '1.4' })
    reading.answer({ after: '1.4' })
    reading.answer({ after: '1.1' })
    reading.feed.remove(first)
    reading.join({ after: '1.8' })
    expect(reading.answer({ after: '1.8' })).toEqual({ after: '1.1' })
    reading.answer({ after: '1.1' })
    reading.push(2, 3, 4, 5)
    expect(between.all).toEqual(['attached 4/9', '5'])
  })

  test('one that waits for its own turn holds the place as well', () => {
    const reading = new Reading(1)
    const first = reading.join({ from: 'start' })
    reading.answer({})
    reading.push(1)
    const own = reading.join({ turn: 'mine' })
    reading.feed.remove(first)
    reading.journal.start('mine')
    reading.journal.chunk('mine')
    reading.join({ after: '1.3' })
    expect(reading.answer({ after: '1.3' })).toEqual({ after: '1.1' })
    reading.answer({ after: '1.1' })
    reading.push(2, 3)
    expect(own.all).toEqual(['2', '3', 'caught up'])
  })

  test('one that asked for what runs is not told from the start because another one asked for that', () => {
    const reading = new Reading(3)
    reading.journal.end('t')
    const all = reading.join({ from: 'start' })
    const running = reading.join({ from: 'running' })
    expect(reading.feed.wanted()).toEqual({})
    reading.answer({})
    expect(reading.feed.wanted()).toEqual({ from: 'running' })
    expect(reading.answer({ from: 'running' })).toEqual({ after: '1.0' })
    reading.answer({ after: '1.0' })
    reading.push(1, 2, 3, 4)
    expect(all.all).toEqual(['attached 0/4', '1', '2', '3', '4', 'caught up'])
    expect(running.all).toEqual(['attached 4/4', 'caught up'])
  })

  test('after a lost connection those who had a place go on first: only a cursor can be told that it is gone', () => {
    const reading = new Reading(3)
    const old = reading.join({ from: 'start' })
    reading.answer({})
    reading.push(1, 2, 3)
    reading.feed.disconnected()
    const late = reading.join({ from: 'running' })
    reading.journal.forget()
    reading.journal.start('other')
    expect(reading.feed.wanted()).toEqual({ after: '1.3' })
    reading.answer({ after: '1.3' })
    reading.push(1)
    expect(old.all.slice(-3)).toEqual(['attached 0/1 epoch-changed', '1', 'caught up'])
    expect(late.all).toEqual([])
    expect(reading.feed.wanted()).toEqual({ from: 'running' })
  })

  test('a place without a cursor that is not kept any more is a reset too: nothing else would tell', () => {
    const reading = new Reading()
    const notes = reading.join({ from: 'start' })
    reading.answer({})
    reading.feed.disconnected()
    reading.journal.start('t')
    reading.journal.chunk('t')
    reading.journal.trim(1)
    expect(reading.feed.wanted()).toEqual({})
    reading.answer({})
    reading.push(2)
    expect(notes.all).toEqual([
      'attached 0/0',
      'caught up',
      'reset trimmed',
      'attached 1/2',
      '2',
      'caught up',
    ])
  })

  test('a place without a cursor that is still there is none', () => {
    const reading = new Reading()
    reading.join({ from: 'start' })
    const own = reading.join({ turn: 'mine' })
    reading.answer({})
    reading.feed.disconnected()
    reading.journal.start('mine')
    reading.answer({})
    reading.push(1)
    expect(own.all).toEqual(['1', 'caught up'])
  })

  test('so it is for who waits for its own turn there', () => {
    const reading = new Reading()
    const first = reading.join({ from: 'start' })
    const own = reading.join({ turn: 'mine' })
    reading.answer({})
    reading.feed.remove(first)
    reading.feed.disconnected()
    reading.journal.start('mine')
    reading.journal.chunk('mine')
    reading.journal.trim(1)
    reading.answer({})
    expect(own.all).toEqual(['reset trimmed', 'attached 1/2'])
  })

  test('a send of old that is accepted again is looked for where it began', () => {
    const reading = new Reading(2)
    reading.join({ from: 'start' })
    const own = reading.join({ turn: 'mine' })
    const other = reading.join({ turn: 'other' })
    reading.journal.start('mine')
    reading.answer({})
    reading.push(1, 2)
    reading.feed.begin('mine', '1.2')
    expect(reading.feed.wanted()).toEqual({ after: '1.2' })
    reading.answer({ after: '1.2' })
    reading.push(3)
    expect(own.all).toEqual(['attached 2/3', '3', 'caught up'])
    expect(other.all).toEqual([])
  })

  test('a send of old whose records are gone is told so', () => {
    const reading = new Reading(3)
    reading.join({ from: 'start' })
    const own = reading.join({ turn: 'mine' })
    reading.answer({})
    reading.push(1, 2, 3)
    reading.journal.trim(2)
    reading.feed.begin('mine', '1.1')
    reading.answer({ after: '1.1' })
    expect(own.all).toEqual(['reset trimmed', 'attached 2/3 trimmed'])
  })

  test('those who do not bear an outage fail, the others stay', () => {
    const reading = new Reading(1)
    const patient = reading.join({ from: 'start' }, true)
    const impatient = reading.join({ from: 'start' }, false)
    reading.feed.fail(new Error('gone'), 'impatient')
    expect(impatient.all).toEqual(['failed gone'])
    expect(patient.all).toEqual([])
    reading.feed.fail(new Error('closed'), 'all')
    expect(patient.all).toEqual(['failed closed'])
    expect(reading.feed.isEmpty).toBe(true)
  })
})

test('it is caught up when it is attached, has what is known, and waits for nothing', () => {
  const reading = new Reading(2)
  expect(reading.feed.isCaughtUp).toBe(true)
  reading.join({ from: 'start' })
  expect(reading.feed.isCaughtUp).toBe(false)
  reading.feed.attaching = 'a'
  expect(reading.feed.isCaughtUp).toBe(false)
  reading.answer({})
  expect(reading.feed.isCaughtUp).toBe(false)
  reading.push(1, 2)
  expect(reading.feed.isCaughtUp).toBe(true)
  reading.journal.chunk('t')
  reading.push(3)
  expect(reading.feed).toMatchObject({ offset: 3, last: 3, isCaughtUp: true })
})

describe('whatever happens on a connection', () => {
  beforeEach(() => void vi.useFakeTimers())
  afterEach(() => void vi.useRealTimers())

  /** Holds rule 1, and that a listener begins where it asked to. */
  class Checked implements SessionListener {
    readonly begin: Begin
    readonly #rig: Rig
    /** The last record had: its offset, and the journal that it was in. */
    had: { offset: number; epoch: string | undefined } | undefined
    failure: Error | undefined
    #isReset = false
    #mustHave: number | undefined

    constructor(rig: Rig, begin: Begin) {
      this.#rig = rig
      this.begin = begin
    }

    attached(attached: Attached): void {
      expect(this.had).toBeUndefined()
      const place = this.#rig.asked.get(attached.id ?? '') as AskedPlace
      // From the first record kept: for who is told again, and for who asks for that.
      if (attached.resync) expect(this.#isReset || this.begin).toEqual(this.#isReset || { from: 'start' })
      else if (this.#isReset) expect([place.after, place.from ?? 'start']).toEqual([undefined, 'start'])
      else if ('after' in this.begin) expect(place.after).toBe(this.begin.after)
      else if ('from' in this.begin)
        expect([place.after, place.from ?? 'start']).toEqual([undefined, this.begin.from])
      this.had = { offset: attached.offset, epoch: attached.cursor.split('.')[0] || undefined }
      this.#mustHave = attached.last
    }

    record(record: SessionRecord): void {
      const epoch = record.cursor.split('.')[0]
      if (this.had) expect([record.offset, epoch]).toEqual([this.had.offset + 1, this.had.epoch ?? epoch])
      else expect(record).toMatchObject({ type: 'turn-start', ...this.begin })
      this.had = { offset: record.offset, epoch }
    }

    caughtUp(): void {
      expect(this.had?.offset).toBeGreaterThanOrEqual(this.#mustHave ?? 0)
    }

    reset(): void {
      this.had = undefined
      this.#isReset = true
    }

    failed(error: Error): void {
      this.failure = error
    }
  }

  type Act = (world: World) => void

  class World {
    readonly rig = new Rig()
    readonly listening: { listener: Checked; detach: () => void }[] = []
    #sends = 0

    constructor(count = 0) {
      for (let written = 0; written < count; written += 1) this.write('a')
      this.join({ from: 'start' })
      this.rig.network.socket.greets()
    }

    join(begin: Begin): void {
      const listener = new Checked(this.rig, begin)
      const detach = this.rig.connection.listen('s', listener, begin, true)
      this.listening.push({ listener, detach })
    }

    /** A turn of this client's own, whose sender listens from its beginning. */
    send(): void {
      this.#sends += 1
      const turn = `own${this.#sends}`
      this.join({ turn })
      // That it is answered is tested elsewhere; a connection that is closed rejects it.
      this.rig.connection.send('s', { turn, body: {} }).catch(() => {})
    }

    leave(which: number): void {
      if (this.listening.length < 2) return
      for (const { detach } of this.listening.splice(which % this.listening.length, 1)) detach()
    }

    write(turn: string): void {
      const { journal } = this.rig
      const known = journal.records.filter((record) => record.turn === turn)
      if (!known.length || known.at(-1)?.type === 'turn-end') journal.start(turn)
      else if (journal.last % 3) journal.chunk(turn)
      else journal.end(turn)
    }

    joinAfter(which: number): void {
      const { journal } = this.rig
      const offset = journal.trimmed + (which % (journal.records.length + 1))
      if (journal.last) this.join({ after: journal.cursor(offset) })
    }
  }

  /** Named, for the counterexample. */
  const named = (name: string, act: Act): Act => Object.assign(act, { [fc.toStringMethod]: () => name })
  const act = (name: string, weight: number, does: Act) => ({
    weight,
    arbitrary: fc.constant(named(name, does)),
  })
  const actWith = <T>(
    name: string,
    weight: number,
    argument: fc.Arbitrary<T>,
    does: (world: World, argument: T) => void,
  ) => ({
    weight,
    arbitrary: argument.map((given) => named(`${name} ${given}`, (world) => does(world, given))),
  })
  const steps = [
    act('take', 6, ({ rig }) => void rig.take()),
    act('push', 8, ({ rig }) => void rig.push()),
    actWith('deliver', 8, fc.integer({ min: 1, max: 4 }), ({ rig }, lines) => void rig.deliver(lines)),
    actWith('write', 6, fc.constantFrom('a', 'b'), (world, turn) => world.write(turn)),
    act('join start', 1, (world) => world.join({ from: 'start' })),
    act('join running', 1, (world) => world.join({ from: 'running' })),
    actWith('join after', 1, fc.nat(1_000), (world, which) => world.joinAfter(which)),
    actWith('leave', 1, fc.nat(1_000), (world, which) => world.leave(which)),
    act('send', 1, (world) => world.send()),
    act('cut', 1, ({ rig }) => rig.cut()),
    actWith('trim', 1, fc.integer({ min: 1, max: 3 }), ({ rig }, count) => rig.trim(count)),
    act('resync', 1, ({ rig }) => rig.resync('too-far-behind')),
  ]
  // Another journal begins with a record: the first cursor is what its loss is seen by.
  const forget = act('forget', 1, (world) => {
    world.rig.forget()
    world.write('a')
  })

  function hold(script: Act[], count: number): void {
    const world = new World(count)
    for (const does of script) does(world)
    world.rig.settle()
    const { last, epoch } = world.rig.journal
    for (const { listener } of world.listening) {
      expect(listener.failure).toBeUndefined()
      expect(listener.had?.offset).toBe(last)
      expect([String(epoch), undefined]).toContain(listener.had?.epoch)
    }
    expect(world.rig.connection.status.state).toBe('live')
    world.rig.connection.close()
  }

  const script = (...more: (typeof forget)[]) =>
    fc.array(fc.oneof(...steps, ...more), { maxLength: 80, size: 'max' })
  const runs = { numRuns: 200 }

  test('each listener gets each offset once, in order, without a gap between two resets, and all of them', () => {
    fc.assert(
      fc.property(script(forget), fc.integer({ min: 1, max: 9 }), (script, count) => hold(script, count)),
      runs,
    )
  })

  test('so it is in a session that nobody has written to before', () => {
    fc.assert(
      fc.property(script(), (script) => hold(script, 0)),
      runs,
    )
  })
})
