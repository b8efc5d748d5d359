import { describe, expect, test } from 'vitest'
import { RefusedError, TurnError } from '../src/errors.js'
import { isRecord, mintId, parseLine, type Said } from '../src/protocol.js'

describe('a line', () => {
  test('is an object with a type, whatever else is in it', () => {
    expect(parseLine('{"type":"new","later":{"than":"this"}}')).toEqual({
      type: 'new',
      later: { than: 'this' },
    })
  })

  test.each(['', 'null', '1', '"hello"', '[]', '{}', '{"type":1}', '<html>', '{"type":"hello"'])(
    'that is none of ours is an error: %s',
    (line) => {
      expect(() => parseLine(line)).toThrow(SyntaxError)
    },
  )
})

test.each([
  ['turn-start', true],
  ['chunk', true],
  ['turn-end', true],
  ['attached', false],
  ['resync', false],
  ['presence', false],
])('%s is a record: %s', (type, is) => {
  expect(isRecord({ type } as Said)).toBe(is)
})

test('an id is 128 random bits of printable ASCII', () => {
  const ids = new Set(Array.from({ length: 1_000 }, mintId))
  expect(ids.size).toBe(1_000)
  for (const id of ids) expect(id).toMatch(/^[0-9a-f]{32}$/)
})

test('a refusal carries what the gateway said', () => {
  const refused = {
    type: 'error',
    code: 'busy',
    message: 'unable to',
    retryable: true,
    retryAfter: 2,
  } as const
  const { name, message, code, retryable, retryAfter } = new RefusedError(refused)
  expect([name, message, code, retryable, retryAfter]).toEqual(['RefusedError', 'unable to', 'busy', true, 2])
})

test('a turn that ended badly without a word says how it ended', () => {
  const error = new TurnError({ chatId: 's', turn: 't', reason: 'interrupted' })
  expect(error).toMatchObject({ code: 'interrupted', status: undefined, retryAfter: undefined })
  expect(error.message).toContain('interrupted')
})
