import { DefaultChatTransport, type UIMessage } from 'ai'
import { describe, expect, test } from 'vitest'
import { makeRequest, plainHeaders, type RequestOptions, resolve } from '../src/request.js'

type Options = RequestOptions<UIMessage>
type Send = Parameters<typeof makeRequest<UIMessage>>[1]

const messages: UIMessage[] = [{ id: 'u1', role: 'user', parts: [{ type: 'text', text: 'hi' }] }]
const send: Send = {
  chatId: 'chat',
  messages,
  trigger: 'submit-message',
  messageId: undefined,
  abortSignal: undefined,
}

/** What the SDK's own transport posts for the same options. */
async function posted(
  options: Options,
  given: Send,
): Promise<{ body: unknown; headers: object; path: string }> {
  let seen: { body: unknown; headers: Record<string, string>; path: string } | undefined
  const { api, headers, body, credentials, prepareSendMessagesRequest } = options
  const defined = Object.entries({ api, headers, body, credentials, prepareSendMessagesRequest })
  const transport = new DefaultChatTransport<UIMessage>({
    ...Object.fromEntries(defined.filter(([, value]) => value !== undefined)),
    fetch: async (url, init = {}) => {
      const sent = init.headers as Record<string, string>
      seen = { body: JSON.parse(String(init.body)), headers: sent, path: String(url) }
      return new Response('data: [DONE]\n\n')
    },
  })
  await (await transport.sendMessages(given)).cancel()
  if (!seen) throw new Error('unable to see what the SDK posts; it posted nothing')
  const { 'content-type': _, ...others } = seen.headers
  return { ...seen, headers: others }
}

describe('the same as DefaultChatTransport posts', () => {
  const table: Record<string, { options?: Options; given?: Partial<Send> }> = {
    'nothing but the chat': {},
    'a regenerated answer': { given: { trigger: 'regenerate-message', messageId: 'a1' } },
    'members of the options': { options: { body: { model: 'big', depth: 1 } } },
    'members of the send win over those of the options': {
      options: { body: { model: 'big', depth: 1 } },
      given: { body: { model: 'small' } },
    },
    'the four members of the SDK win over all': {
      options: { body: { id: 'x', messages: [], trigger: 'x', messageId: 'x' } },
      given: { body: { id: 'y', messages: 'y' }, messageId: 'm' },
    },
    'a body that is asked for': { options: { body: () => ({ at: 1 }) } },
    'a body that is waited for': { options: { body: async () => ({ at: 2 }) } },
    'a promised body': { options: { body: Promise.resolve({ at: 3 }) } },
    'headers of the options': { options: { headers: { Authorization: 'Bearer a', 'X-One': '1' } } },
    'headers as an object of their own': { options: { headers: new Headers({ Authorization: 'a' }) } },
    'headers of the send win, whatever their case': {
      options: { headers: async () => ({ Authorization: 'a', 'X-One': '1' }) },
      given: { headers: { AUTHORIZATION: 'b' } },
    },
    'headers that are not there': {
      options: { headers: { authorization: undefined, 'x-one': '1' } as unknown as Record<string, string> },
      given: { headers: { 'x-two': undefined } as unknown as Record<string, string> },
    },
    'another path': { options: { api: '/api/other' } },
    'a body that is prepared replaces all of it': {
      options: {
        body: { dropped: true },
        prepareSendMessagesRequest: ({ id, messages }) => ({ body: { id, last: messages.at(-1) } }),
      },
    },
    'headers that are prepared replace all of them': {
      options: {
        headers: { dropped: 'x' },
        prepareSendMessagesRequest: ({ body }) => ({ body: { ...body }, headers: { 'X-Only': '1' } }),
      },
      given: { headers: { 'dropped-too': 'x' } },
    },
    'headers that are not prepared stay': {
      options: { headers: { kept: 'x' }, prepareSendMessagesRequest: async () => ({ body: {} }) },
    },
    'a path that is prepared': {
      options: { api: '/api/chat', prepareSendMessagesRequest: () => ({ body: {}, api: '/api/third' }) },
    },
    'prepared with all that is known': {
      options: {
        api: '/api/other',
        headers: { One: '1' },
        body: { two: 2 },
        credentials: 'include',
        prepareSendMessagesRequest: (known) => ({ body: { known } }),
      },
      given: { metadata: { of: 'the send' }, body: { three: 3 }, headers: { Four: '4' }, messageId: 'm' },
    },
    'prepared, by default, with the default path': {
      options: { prepareSendMessagesRequest: (known) => ({ body: { known } }) },
    },
  }
  test.each(Object.entries(table))('%s', async (_, { options = {}, given = {} }) => {
    const theirs = await posted(options, { ...send, ...given })
    const ours = await makeRequest(options, { ...send, ...given })
    expect(JSON.parse(JSON.stringify(ours.body))).toEqual(theirs.body)
    expect(ours.headers ?? {}).toStrictEqual(theirs.headers)
    expect(ours.path ?? '/api/chat').toBe(theirs.path)
  })
})

test('without a path of its own the gateway chooses', async () => {
  expect(await makeRequest({}, send)).not.toHaveProperty('path')
})

test.each([
  ['/api/chat', '/api/chat'],
  ['api/chat', '/api/chat'],
  ['http://elsewhere.example/api/chat?model=big', '/api/chat'],
])('of the address %s the path counts: %s', async (api, path) => {
  expect(await makeRequest({ api }, send)).toMatchObject({ path })
})

describe('what a send does while another turn runs', () => {
  test('is left to the gateway', async () => {
    expect(await makeRequest({}, send)).not.toHaveProperty('overlap')
  })

  test('is asked for at each send', async () => {
    expect(await makeRequest({ overlap: async () => 'reject' as const }, send)).toMatchObject({
      overlap: 'reject',
    })
  })

  test('may be prepared, which wins', async () => {
    const prepareSendMessagesRequest = () => ({ body: {}, overlap: 'interrupt' }) as const
    const request = await makeRequest({ overlap: 'parallel', prepareSendMessagesRequest }, send)
    expect(request).toMatchObject({ overlap: 'interrupt' })
  })
})

test('headers are named in lower case, and no headers are none', () => {
  expect(plainHeaders({ 'X-One': '1' })).toEqual({ 'x-one': '1' })
  expect(plainHeaders([['X-One', '1']])).toEqual({ 'x-one': '1' })
  expect(plainHeaders(new Headers({ 'X-One': '1' }))).toEqual({ 'x-one': '1' })
  expect(plainHeaders(undefined)).toEqual({})
})

test('a value is asked for when it is needed', async () => {
  let asked = 0
  const value = () => ++asked
  expect([await resolve(value), await resolve(value), await resolve(3), await resolve(undefined)]).toEqual([
    1,
    2,
    3,
    undefined,
  ])
})
