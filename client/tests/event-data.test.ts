import { createParser } from 'eventsource-parser'
import { describe, expect, it } from 'vitest'
import { EventData } from '../src/carriers/event-data.js'

/** What the AI SDK's own parser makes of it. */
function reference(text: string): string[] {
  const found: string[] = []
  const parser = createParser({ onEvent: ({ data }) => found.push(data) })
  parser.feed(text)
  return found
}

/** A small generator with a seed: the same streams each time. */
function dice(seed: number): (sides: number) => number {
  let state = seed
  return (sides) => {
    state = (Math.imul(state, 1_664_525) + 1_013_904_223) >>> 0
    return Math.floor((state / 2 ** 32) * sides)
  }
}

const PIECES = [
  'data: {"type":"chunk"}',
  'data:no space',
  'data:  two',
  'data:',
  'data',
  'event: attached',
  'id: a.1.b',
  ': heartbeat',
  'retry: 5',
  'datum: no field',
  '',
  '',
  '',
  'data: \u2028 and \u{1f600}',
  'data: "a: b"',
]

describe('EventData', () => {
  it('gives the data of the events of a stream', () => {
    const stream = ': hi\n\nevent: attached\nid: a\ndata: {"a":1}\n\nid: b\ndata: {"b":2}\n\n'
    expect(new EventData().feed(stream)).toEqual(['{"a":1}', '{"b":2}'])
  })

  it('joins lines of data, and keeps what is not complete', () => {
    const events = new EventData()
    expect(events.feed('data: a\ndata: b\n')).toEqual([])
    expect(events.feed('\ndata: c')).toEqual(['a\nb'])
    expect(events.feed('\r\n\r\n')).toEqual(['c'])
  })

  it('agrees with the parser of the AI SDK on any stream, wherever it is cut', () => {
    for (let seed = 0; seed < 500; seed += 1) {
      const roll = dice(seed)
      const end = roll(2) === 0 ? '\n' : '\r\n'
      const lines = Array.from({ length: roll(30) }, () => PIECES[roll(PIECES.length)])
      const stream = lines.map((line) => line + end).join('')
      const events = new EventData()
      const found: string[] = []
      for (let at = 0; at < stream.length; ) {
        const length = 1 + roll(12)
        found.push(...events.feed(stream.slice(at, at + length)))
        at += length
      }
      expect(found, `seed ${seed}`).toEqual(reference(stream))
    }
  })

  it('does not keep more than an event may hold, in one line or in many', () => {
    const megabyte = 'x'.repeat(2 ** 20)
    for (const line of [megabyte, `data: ${megabyte}\n`]) {
      const events = new EventData()
      events.feed('data: ')
      expect(() => {
        for (let fed = 0; fed < 64; fed += 1) events.feed(line)
      }).toThrow(RangeError)
    }
  })

  it('counts anew with each event', () => {
    const events = new EventData()
    const megabyte = 'x'.repeat(2 ** 20)
    for (let fed = 0; fed < 64; fed += 1) expect(events.feed(`data: ${megabyte}\n\n`)).toHaveLength(1)
  })
})
