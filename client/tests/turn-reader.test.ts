import type { UIMessageChunk } from 'ai'
import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import { networkError, type TurnEnd, TurnError } from '../src/errors.js'
import type { SessionRecord, TurnEndRecord } from '../src/protocol.js'
import { TurnReader, type TurnReaderOptions } from '../src/turn-reader.js'
import { Journal } from './support/journal.js'

/** A reader, and what it tells. */
class Turned {
  readonly journal = new Journal()
  readonly ends: TurnEnd[] = []
  readonly failures: Error[] = []
  left = 0
  readonly reader: TurnReader

  constructor(options: Partial<TurnReaderOptions> = {}) {
    this.reader = new TurnReader({
      chatId: 's',
      turn: 't',
      onEnd: (end) => this.ends.push(end),
      onFailed: (error) => this.failures.push(error),
      onLeft: () => {
        this.left += 1
      },
      ...options,
    })
  }

  tell(record: SessionRecord, size = 1): void {
    this.reader.record(record, size)
  }

  start(): void {
    this.tell(this.journal.start('t'))
  }

  chunks(...deltas: string[]): void {
    for (const delta of deltas) this.tell(this.journal.chunk('t', chunk(delta)))
  }

  end(end: Partial<TurnEndRecord> = {}): void {
    this.tell(this.journal.end('t', end))
  }
}

const backlogged = { type: 'chunk', session: 's', turn: 't', offset: 0, cursor: '' } as const

function chunk(delta: string): UIMessageChunk {
  return { type: 'text-delta', id: '1', delta }
}

/** All that a stream gives, and what it ended with. */
async function drain(stream: ReadableStream<UIMessageChunk>): Promise<{ read: string[]; error?: unknown }> {
  const read: string[] = []
  try {
    for await (const one of stream) read.push(one.type === 'text-delta' ? one.delta : one.type)
    return { read }
  } catch (error) {
    return { read, error }
  }
}

describe('how a turn ends', () => {
  const table: [reason: Partial<TurnEndRecord>, error: object | undefined][] = [
    [{ reason: 'complete' }, undefined],
    [{ reason: 'cancelled', by: { client: 'other' } }, { name: 'AbortError' }],
    [
      {
        reason: 'error',
        error: { code: 'upstream-refused', message: 'no credit', status: 402, retryAfter: 7 },
      },
      { name: 'TurnError', code: 'upstream-refused', message: 'no credit', status: 402, retryAfter: 7 },
    ],
    [
      { reason: 'interrupted', error: { code: 'node-lost', message: 'gone' } },
      { name: 'TurnError', code: 'node-lost', reason: 'interrupted', turn: 't' },
    ],
    [{ reason: 'interrupted' }, { name: 'TurnError', code: 'interrupted' }],
    [{ reason: 'error', error: { code: 'upstream-error', message: 'told by its chunk' } }, undefined],
  ]
  test.each(table)('%o', async (end, error) => {
    const turned = new Turned()
    turned.start()
    turned.chunks('a', 'b')
    turned.end(end)
    expect(turned.reader.isOver).toBe(true)
    const drained = await drain(turned.reader.stream)
    expect(drained.read).toEqual(['a', 'b']) // all that came before an error is read first
    if (error === undefined) expect(drained).not.toHaveProperty('error')
    else expect(drained.error).toMatchObject(error)
    expect(turned.ends).toEqual([{ chatId: 's', turn: 't', ...end }])
    expect(turned.left).toBe(1)
    expect(turned.failures).toEqual([])
  })

  test('an abort is what the SDK takes for one', async () => {
    const turned = new Turned()
    turned.end({ reason: 'cancelled' })
    const { error } = await drain(turned.reader.stream)
    expect(error).toBeInstanceOf(DOMException)
  })

  test('it ends once, and nothing after its end counts', async () => {
    const turned = new Turned()
    turned.start()
    turned.end()
    turned.chunks('late')
    turned.end({ reason: 'cancelled' })
    turned.reader.failed(new Error('late'))
    expect(await drain(turned.reader.stream)).toEqual({ read: [] })
    expect(turned.ends).toHaveLength(1)
    expect(turned.failures).toEqual([])
  })

  test('the SDK reads no further than an error chunk; the end is told all the same, and who follows leaves then', async () => {
    const turned = new Turned()
    turned.start()
    turned.tell(turned.journal.chunk('t', { type: 'error', errorText: 'no' }))
    const reader = turned.reader.stream.getReader()
    expect((await reader.read()).value?.type).toBe('error')
    await reader.cancel()
    expect([turned.left, turned.ends.length]).toEqual([0, 0])
    turned.chunks('unread')
    turned.end({ reason: 'error', error: { code: 'upstream-error', message: 'no' } })
    expect([turned.left, turned.ends.length]).toEqual([1, 1])
  })
})

describe('the stream', () => {
  test('waits for what comes', async () => {
    const turned = new Turned()
    const drained = drain(turned.reader.stream)
    turned.start()
    for (const delta of ['a', 'b', 'c']) {
      turned.chunks(delta)
      await Promise.resolve()
    }
    turned.end()
    expect(await drained).toEqual({ read: ['a', 'b', 'c'] })
  })

  test('is of one turn, and of what the SDK understands', async () => {
    const turned = new Turned()
    turned.start()
    turned.tell(turned.journal.start('other'))
    turned.tell(turned.journal.chunk('other', chunk('x')))
    turned.tell(turned.journal.chunk('t', 'no object'))
    turned.tell(turned.journal.chunk('t', null))
    turned.tell(turned.journal.chunk('t', { no: 'type' }))
    turned.chunks('a')
    turned.tell(turned.journal.end('other'))
    turned.end()
    expect(await drain(turned.reader.stream)).toEqual({ read: ['a'] })
    expect(turned.reader.taken).toBe(4)
  })

  test('cancelled by its reader detaches once, and ends nothing', async () => {
    const turned = new Turned()
    turned.start()
    turned.chunks('a')
    await turned.reader.stream.cancel()
    expect(turned.left).toBe(1)
    turned.reader.leave()
    turned.reader.abort()
    turned.end()
    expect([turned.left, turned.ends.length, turned.failures.length]).toEqual([1, 0, 0])
  })

  test('aborted fails at once, with what was not read', async () => {
    const turned = new Turned()
    turned.start()
    turned.chunks('unread')
    turned.reader.abort()
    turned.reader.abort()
    expect(await drain(turned.reader.stream)).toMatchObject({ read: [], error: { name: 'AbortError' } })
    expect(turned.left).toBe(1)
  })

  test('aborted after its end stays as it was', async () => {
    const turned = new Turned()
    const drained = drain(turned.reader.stream)
    turned.start()
    turned.end()
    expect(await drained).toEqual({ read: [] })
    turned.reader.abort()
    expect(turned.left).toBe(1)
  })

  test('fails when it is given up, after what came before, and says so', async () => {
    const turned = new Turned()
    turned.start()
    turned.chunks('a')
    const error = networkError()
    turned.reader.failed(error)
    turned.reader.failed(new Error('again'))
    expect(await drain(turned.reader.stream)).toEqual({ read: ['a'], error })
    expect(turned.failures).toEqual([error])
    expect([turned.left, turned.ends.length]).toEqual([1, 0])
    // What useChat takes for a lost network.
    expect(error).toBeInstanceOf(TypeError)
    expect(error.message).toContain('network')
  })

  test('has a bound: what nobody reads fails it', async () => {
    const turned = new Turned()
    turned.start()
    const half = 16 * 1024 * 1024
    turned.tell(turned.journal.chunk('t', chunk('a')), half)
    turned.tell(turned.journal.chunk('t', chunk('b')), half)
    expect(turned.failures).toEqual([])
    turned.tell(turned.journal.chunk('t', chunk('c')), 1)
    expect(turned.failures).toHaveLength(1)
    const drained = await drain(turned.reader.stream)
    expect(drained.read).toEqual([])
    expect(String(drained.error)).toContain('unable to keep the answer')
  })

  test('a long backlog comes whole and in order', async () => {
    const turned = new Turned()
    const deltas = Array.from({ length: 80_000 }, (_, index) => String(index))
    turned.start()
    for (const delta of deltas) turned.reader.record({ ...backlogged, data: chunk(delta) }, 1)
    turned.end()
    expect((await drain(turned.reader.stream)).read).toEqual(deltas)
  })

  test('has room again for what was read', async () => {
    const turned = new Turned()
    const reader = turned.reader.stream.getReader()
    turned.start()
    for (let read = 0; read < 5; read += 1) {
      turned.tell(turned.journal.chunk('t', chunk('a')), 16 * 1024 * 1024)
      await reader.read()
    }
    expect(turned.failures).toEqual([])
  })
})

describe('told again from the start', () => {
  test('it gives only what is new', async () => {
    const turned = new Turned()
    turned.start()
    turned.chunks('a', 'b')
    turned.reader.reset()
    for (const record of turned.journal.records) turned.tell(record)
    turned.reader.caughtUp()
    turned.chunks('c')
    turned.end()
    expect(await drain(turned.reader.stream)).toEqual({ read: ['a', 'b', 'c'] })
  })

  test('it skips what an earlier stream had', async () => {
    const turned = new Turned({ skip: 2 })
    turned.start()
    turned.chunks('a', 'b', 'c')
    turned.end()
    expect(turned.reader.taken).toBe(3)
    expect(await drain(turned.reader.stream)).toEqual({ read: ['c'] })
  })

  test('it fails when its turn is not there any more', async () => {
    const turned = new Turned()
    turned.start()
    turned.chunks('a')
    turned.reader.reset()
    turned.tell(turned.journal.start('other'))
    turned.reader.caughtUp()
    const { read, error } = await drain(turned.reader.stream)
    expect(read).toEqual(['a'])
    expect(error).toBeInstanceOf(TurnError)
    expect(error).toMatchObject({ reason: 'interrupted', code: 'journal-lost' })
  })

  test('it fails when only the rest of its turn is there: nobody could tell how much is missing', async () => {
    const turned = new Turned()
    turned.start()
    turned.chunks('a', 'b', 'c', 'd')
    turned.reader.reset()
    // Two turns that ran at once are trimmed by whole turns: of the older one the last records stay.
    turned.chunks('e', 'f', 'g', 'h', 'i', 'j')
    turned.end()
    turned.reader.caughtUp()
    const { read, error } = await drain(turned.reader.stream)
    expect(read).toEqual(['a', 'b', 'c', 'd'])
    expect(error).toMatchObject({ code: 'journal-lost' })
    expect(turned.ends).toEqual([])
  })

  test('it waits for a turn that is not accepted yet', async () => {
    const turned = new Turned()
    turned.reader.isAccepted = false
    turned.reader.reset()
    turned.reader.caughtUp()
    turned.start()
    turned.chunks('a')
    turned.reader.caughtUp()
    turned.end()
    expect(turned.reader.isAccepted).toBe(true)
    expect(await drain(turned.reader.stream)).toEqual({ read: ['a'] })
  })

  test('cut anywhere, replayed any number of times, read at any pace: each chunk once, in order', async () => {
    const cuts = fc.array(fc.nat(12), { maxLength: 5 })
    const property = fc.asyncProperty(
      fc.nat(12),
      cuts,
      fc.boolean(),
      fc.nat(12),
      async (count, cuts, reads, had) => {
        const deltas = Array.from({ length: count }, (_, at) => `${at}`)
        const skip = Math.min(had, count)
        const turned = new Turned({ skip })
        const { journal } = turned
        journal.start('t')
        for (const delta of deltas) {
          journal.chunk('t', chunk(delta))
          if (count % 2) journal.chunk('other', chunk('x'))
        }
        journal.end('t')
        const early = reads ? drain(turned.reader.stream) : undefined
        // The end is told last: after it nothing is told again.
        for (const cut of cuts) {
          for (const record of journal.records.slice(0, Math.min(cut, journal.records.length - 1))) {
            turned.tell(record)
            if (cut % 3 === 0) await Promise.resolve()
          }
          turned.reader.reset()
        }
        for (const record of journal.records) turned.tell(record)
        expect(await (early ?? drain(turned.reader.stream))).toEqual({ read: deltas.slice(skip) })
        expect([turned.left, turned.ends.length, turned.reader.taken]).toEqual([1, 1, count])
      },
    )
    await fc.assert(property)
  })
})
