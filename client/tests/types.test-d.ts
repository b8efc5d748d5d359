/** The type of every public name, as `ai` 5, 6 and 7 see it. Nothing here is run. */
import { Chat, type UseChatHelpers, useChat } from '@ai-sdk/react'
import { type ChatTransport, DefaultChatTransport, type UIMessage, type UIMessageChunk } from 'ai'
import { expectTypeOf, test } from 'vitest'
import * as core from '../src/index.js'
import * as react from '../src/react.js'

/** An app's own messages: metadata, and a data part. */
type Order = UIMessage<{ total: number }, { basket: { items: number } }>

const transport = new core.GatewayChatTransport<Order>()

test('nothing else is exported as a value', () => {
  expectTypeOf<keyof typeof core>().toEqualTypeOf<
    | 'ClosedError'
    | 'DEFAULT_TIMING'
    | 'GatewayChatTransport'
    | 'GatewayConnection'
    | 'RefusedError'
    | 'TurnError'
    | 'mintId'
    | 'observe'
  >()
  expectTypeOf<keyof typeof react>().toEqualTypeOf<'useGatewayChat'>()
})

test('the SDK takes the transport for what its own are', () => {
  expectTypeOf<UIMessage>().not.toBeAny()
  expectTypeOf<ChatTransport<UIMessage>>().not.toBeAny()
  expectTypeOf<core.GatewayChatTransport>().toExtend<ChatTransport<UIMessage>>()
  expectTypeOf<core.GatewayChatTransport<Order>>().toExtend<ChatTransport<Order>>()
  expectTypeOf(useChat<Order>).toBeCallableWith({ id: 'one', transport })
  expectTypeOf(new Chat<Order>({ id: 'one', transport }).messages).toEqualTypeOf<Order[]>()
})

test('one line in useChat is enough', () => {
  useChat({ transport: new core.GatewayChatTransport() })
  useChat<Order>({ transport: new core.GatewayChatTransport({ url: 'https://gateway.example' }) })
})

test('the transport', () => {
  expectTypeOf(core.GatewayChatTransport).toBeConstructibleWith()
  expectTypeOf(core.GatewayChatTransport).toBeConstructibleWith({})
  expectTypeOf<core.GatewayChatTransport['resumeStreamIsReplay']>().toEqualTypeOf<true>()
  expectTypeOf(transport.client).toEqualTypeOf<string>()
  expectTypeOf(transport.gateway).toEqualTypeOf<core.GatewayConnection>()
  expectTypeOf(transport.connection).toEqualTypeOf<core.ConnectionStatus>()
  expectTypeOf(transport.subscribe).toEqualTypeOf<(listener: () => void) => () => void>()
  expectTypeOf(transport.onTurnEnd).toEqualTypeOf<(listener: (end: core.TurnEnd) => void) => () => void>()
  expectTypeOf(transport.position).toEqualTypeOf<(chatId: string) => { offset: number; last: number }>()
  expectTypeOf(transport.reconnect).toEqualTypeOf<() => void>()
  expectTypeOf(transport.close).toEqualTypeOf<() => void>()
  expectTypeOf(transport.cancel).toEqualTypeOf<
    (chatId: string, options?: { readonly turn?: string }) => Promise<core.CancelledTurn[]>
  >()
  expectTypeOf(transport.sendMessages).parameters.toEqualTypeOf<
    Parameters<ChatTransport<Order>['sendMessages']>
  >()
  expectTypeOf(transport.sendMessages).returns.resolves.toEqualTypeOf<ReadableStream<UIMessageChunk>>()
  expectTypeOf(transport.reconnectToStream).parameters.toEqualTypeOf<
    Parameters<ChatTransport<Order>['reconnectToStream']>
  >()
  expectTypeOf(
    transport.reconnectToStream,
  ).returns.resolves.toEqualTypeOf<ReadableStream<UIMessageChunk> | null>()
})

test('the options of the transport', () => {
  type Options = core.GatewayChatTransportOptions<Order>
  expectTypeOf<keyof Options>().toEqualTypeOf<
    | 'url'
    | 'api'
    | 'headers'
    | 'body'
    | 'credentials'
    | 'prepareSendMessagesRequest'
    | 'overlap'
    | 'onAbort'
    | 'onTurnEnd'
    | 'carriers'
    | 'client'
    | 'fetch'
    | 'WebSocket'
    | 'timing'
  >()
  expectTypeOf<core.GatewayChatTransportOptions>().toEqualTypeOf<
    core.GatewayChatTransportOptions<UIMessage>
  >()
  // Everything has a default.
  expectTypeOf<Record<never, never>>().toExtend<Options>()
  expectTypeOf<Options['url']>().toEqualTypeOf<string | URL | undefined>()
  expectTypeOf<Options['api']>().toEqualTypeOf<string | undefined>()
  expectTypeOf<Options['carriers']>().toEqualTypeOf<readonly core.CarrierName[] | undefined>()
  expectTypeOf<Options['onAbort']>().toEqualTypeOf<'detach' | 'cancel' | undefined>()
  expectTypeOf<Options['onTurnEnd']>().toEqualTypeOf<((end: core.TurnEnd) => void) | undefined>()
  expectTypeOf<Options['overlap']>().toEqualTypeOf<core.Resolvable<core.Overlap> | undefined>()
  expectTypeOf<Options['timing']>().toEqualTypeOf<Partial<core.Timing> | undefined>()
  expectTypeOf<Options['WebSocket']>().toEqualTypeOf<typeof WebSocket | undefined>()
  expectTypeOf<Options['fetch']>().toEqualTypeOf<typeof fetch | undefined>()
})

test('what a stock transport is made with, this one is made with', () => {
  const options = {
    api: '/api/chat',
    headers: () => ({ authorization: 'Bearer one' }),
    body: async () => ({ locale: 'de' }),
    credentials: 'include' as const,
    prepareSendMessagesRequest: ({ id, messages }: { id: string; messages: Order[] }) => ({
      body: { id, message: messages.at(-1) },
    }),
  }
  new DefaultChatTransport<Order>(options)
  new core.GatewayChatTransport<Order>(options)
})

test('prepareSendMessagesRequest', () => {
  type Prepare = core.PrepareSendMessagesRequest<Order>
  expectTypeOf<Prepare>().parameters.toEqualTypeOf<[core.PrepareOptions<Order>]>()
  expectTypeOf<Prepare>().returns.toEqualTypeOf<core.PreparedRequest | PromiseLike<core.PreparedRequest>>()
  expectTypeOf<core.PrepareOptions<Order>['messages']>().toEqualTypeOf<Order[]>()
  expectTypeOf<core.PrepareOptions<Order>['trigger']>().toEqualTypeOf<
    'submit-message' | 'regenerate-message'
  >()
  expectTypeOf<{ body: { id: string }; overlap: 'reject' }>().toExtend<core.PreparedRequest>()
  expectTypeOf<core.PreparedRequest['overlap']>().toEqualTypeOf<core.Overlap | undefined>()
})

test('a resolvable value', () => {
  expectTypeOf<core.Resolvable<number>>().toEqualTypeOf<
    number | Promise<number> | (() => number | Promise<number>)
  >()
})

test('the connection', () => {
  const connection = new core.GatewayConnection({ url: new URL('https://gateway.example') })
  expectTypeOf(core.GatewayConnection).toBeConstructibleWith()
  expectTypeOf(core.GatewayConnection).toBeConstructibleWith({})
  expectTypeOf(connection.client).toEqualTypeOf<string>()
  expectTypeOf(connection.status).toEqualTypeOf<core.ConnectionStatus>()
  expectTypeOf(connection.subscribe).toEqualTypeOf<(listener: () => void) => () => void>()
  expectTypeOf(connection.position).toEqualTypeOf<(session: string) => { offset: number; last: number }>()
  expectTypeOf(connection.attach).toEqualTypeOf<
    (session: string, listener: core.SessionListener, options?: core.AttachOptions) => () => void
  >()
  expectTypeOf(connection.send).toEqualTypeOf<
    (session: string, request: core.SendRequest) => Promise<core.Accepted>
  >()
  expectTypeOf(connection.cancel).toEqualTypeOf<
    (session: string, turn?: string) => Promise<core.CancelledTurn[]>
  >()
  expectTypeOf(connection.reconnect).toEqualTypeOf<() => void>()
  expectTypeOf(connection.close).toEqualTypeOf<() => void>()
})

test('what the connection is given', () => {
  expectTypeOf<Record<never, never>>().toExtend<core.GatewayConnectionOptions>()
  expectTypeOf<core.GatewayConnectionOptions['url']>().toEqualTypeOf<string | URL | undefined>()
  expectTypeOf<core.SendRequest['body']>().toEqualTypeOf<object>()
  expectTypeOf<{ body: { id: string } }>().toExtend<core.SendRequest>()
  expectTypeOf<core.SendRequest['overlap']>().toEqualTypeOf<core.Overlap | undefined>()
  expectTypeOf<core.AttachOptions['from']>().toEqualTypeOf<'start' | 'running' | undefined>()
  expectTypeOf<core.AttachOptions['after']>().toEqualTypeOf<string | undefined>()
  // Whoever listens need not take the sizes.
  expectTypeOf<{ record(record: core.SessionRecord): void }>().toExtend<core.SessionListener>()
})

test('the status of the connection', () => {
  expectTypeOf<core.ConnectionPhase>().toEqualTypeOf<
    'idle' | 'connecting' | 'catching-up' | 'live' | 'offline' | 'closed'
  >()
  expectTypeOf<core.ConnectionStatus['state']>().toEqualTypeOf<core.ConnectionPhase>()
  expectTypeOf<core.ConnectionStatus['carrier']>().toEqualTypeOf<core.CarrierName>()
  expectTypeOf<core.ConnectionStatus['error']>().toEqualTypeOf<Error | undefined>()
})

test('the words of the wire', () => {
  expectTypeOf<core.CarrierName>().toEqualTypeOf<'websocket' | 'sse' | 'long-poll'>()
  expectTypeOf<core.Overlap>().toEqualTypeOf<'parallel' | 'reject' | 'interrupt'>()
  expectTypeOf<core.EndReason>().toEqualTypeOf<'complete' | 'cancelled' | 'error' | 'interrupted'>()
  expectTypeOf<core.CancelResult>().toEqualTypeOf<'cancelled' | 'already-ended' | 'interrupted' | 'unknown'>()
  expectTypeOf<core.ResyncReason>().toEqualTypeOf<'epoch-changed' | 'trimmed' | 'too-far-behind'>()
})

test('records', () => {
  expectTypeOf<core.SessionRecord>().toEqualTypeOf<core.TurnStart | core.Chunk | core.TurnEndRecord>()
  expectTypeOf<core.SessionRecord['type']>().toEqualTypeOf<'turn-start' | 'chunk' | 'turn-end'>()
  expectTypeOf<core.SessionRecord['offset']>().toEqualTypeOf<number>()
  expectTypeOf<core.SessionRecord['cursor']>().toEqualTypeOf<string>()
  expectTypeOf<core.TurnStart['by']>().toEqualTypeOf<core.By>()
  expectTypeOf<core.TurnStart['messages']>().toEqualTypeOf<readonly unknown[]>()
  expectTypeOf<core.Chunk['data']>().toEqualTypeOf<unknown>()
  expectTypeOf<core.TurnEndRecord['reason']>().toEqualTypeOf<core.EndReason>()
  expectTypeOf<core.TurnEndRecord['error']>().toEqualTypeOf<core.Failure | undefined>()
})

test('replies', () => {
  expectTypeOf<core.Attached['turns']>().toEqualTypeOf<readonly core.TurnStatus[]>()
  expectTypeOf<core.Attached['resync']>().toEqualTypeOf<core.ResyncReason | undefined>()
  expectTypeOf<core.TurnStatus>().toEqualTypeOf<{
    readonly turn: string
    readonly state: string
    readonly offset: number
  }>()
  expectTypeOf<core.Accepted['turn']>().toEqualTypeOf<string>()
  expectTypeOf<core.CancelledTurn>().toEqualTypeOf<{
    readonly turn: string
    readonly result: core.CancelResult
  }>()
  expectTypeOf<core.By>().toEqualTypeOf<{
    readonly client?: string
    readonly user?: string
    readonly backend?: boolean
  }>()
  expectTypeOf<core.Failure['status']>().toEqualTypeOf<number | undefined>()
})

test('how a turn ended', () => {
  expectTypeOf<core.TurnEnd>().toEqualTypeOf<{
    readonly chatId: string
    readonly turn: string
    readonly reason: core.EndReason
    readonly by?: core.By
    readonly error?: core.Failure
  }>()
})

test('errors are told apart by their class', () => {
  expectTypeOf<core.RefusedError>().toExtend<Error>()
  expectTypeOf<core.RefusedError['code']>().toEqualTypeOf<string>()
  expectTypeOf<core.RefusedError['retryable']>().toEqualTypeOf<boolean>()
  expectTypeOf<core.RefusedError['retryAfter']>().toEqualTypeOf<number | undefined>()
  expectTypeOf<core.ClosedError>().toExtend<Error>()
  expectTypeOf<core.ClosedError['code']>().toEqualTypeOf<number>()
  expectTypeOf<core.TurnError>().toExtend<Error>()
  expectTypeOf<core.TurnError['code']>().toEqualTypeOf<string>()
  expectTypeOf<core.TurnError['reason']>().toEqualTypeOf<core.EndReason>()
  expectTypeOf<core.TurnError['name']>().toEqualTypeOf<'TurnError'>()
})

test('timing and ids', () => {
  expectTypeOf<core.Timing[keyof core.Timing]>().toEqualTypeOf<number>()
  expectTypeOf(core.DEFAULT_TIMING).toEqualTypeOf<core.Timing>()
  expectTypeOf(core.mintId).toEqualTypeOf<() => string>()
})

test('a chat of any framework can be observed', () => {
  expectTypeOf<Chat<Order>>().toExtend<core.ObservableChat<Order>>()
  expectTypeOf(core.observe<Order>).parameters.toEqualTypeOf<
    [core.ObservableChat<Order>, core.GatewayChatTransport<Order>]
  >()
  expectTypeOf(core.observe<Order>).returns.toEqualTypeOf<() => void>()
})

test('useGatewayChat', () => {
  type Options = react.UseGatewayChatOptions<Order>
  type Helpers = react.UseGatewayChatHelpers<Order>
  expectTypeOf(react.useGatewayChat<Order>).parameters.toEqualTypeOf<[Options]>()
  expectTypeOf(react.useGatewayChat<Order>).returns.toEqualTypeOf<Helpers>()
  expectTypeOf<Options['transport']>().toEqualTypeOf<core.GatewayChatTransport<Order>>()
  // A page that used `useChat` finds all it used.
  expectTypeOf<Helpers>().toExtend<UseChatHelpers<Order>>()
  expectTypeOf<Exclude<keyof Helpers, keyof UseChatHelpers<Order>>>().toEqualTypeOf<
    'connection' | 'lastTurnEnd'
  >()
  expectTypeOf<Helpers['messages']>().toEqualTypeOf<Order[]>()
  expectTypeOf<Helpers['connection']>().toEqualTypeOf<core.ConnectionStatus>()
  expectTypeOf<Helpers['lastTurnEnd']>().toEqualTypeOf<core.TurnEnd | undefined>()
  expectTypeOf<Helpers['stop']>().returns.toEqualTypeOf<Promise<void>>()
})

test('useGatewayChat takes what useChat takes', () => {
  react.useGatewayChat<Order>({
    id: 'one',
    messages: [],
    transport,
    experimental_throttle: 50,
    throttle: 50,
    onFinish: ({ message, isAbort, isDisconnect, isError }) => {
      expectTypeOf(message).toEqualTypeOf<Order>()
      expectTypeOf(isAbort || isDisconnect || isError).toEqualTypeOf<boolean>()
    },
    onError: (error) => expectTypeOf(error).toEqualTypeOf<Error>(),
  })
  react.useGatewayChat<Order>({ chat: new Chat<Order>({ id: 'one', transport }), transport })
  // @ts-expect-error without a transport there is no gateway
  react.useGatewayChat<Order>({ id: 'one' })
  // @ts-expect-error a chat that is given has its id and its messages
  react.useGatewayChat<Order>({ chat: new Chat<Order>({ transport }), transport, id: 'one' })
})
