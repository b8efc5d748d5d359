/** Every public name and its type: what a page compiles against. `npm run check` holds it against `ai` 5 and 6 too. */
import type { ChatTransport, UIMessage, UIMessageChunk } from 'ai'
import { expectTypeOf, test } from 'vitest'
import type {
  Accepted,
  Attached,
  AttachOptions,
  By,
  CancelledTurn,
  CancelResult,
  CarrierName,
  Chunk,
  ConnectionPhase,
  ConnectionStatus,
  EndReason,
  Failure,
  GatewayChatTransportOptions,
  GatewayConnectionOptions,
  ObservableChat,
  Overlap,
  PreparedRequest,
  PrepareOptions,
  PrepareSendMessagesRequest,
  Resolvable,
  ResyncReason,
  SendRequest,
  SessionListener,
  SessionRecord,
  Timing,
  TurnEnd,
  TurnEndRecord,
  TurnStart,
  TurnStatus,
} from '../src/index.js'
import * as all from '../src/index.js'
import type { UseGatewayChatHelpers, UseGatewayChatOptions } from '../src/react.js'
import { useGatewayChat } from '../src/react.js'

type MyMessage = UIMessage<{ at: number }, { note: { text: string } }>

test('the values', () => {
  type Value = keyof typeof all
  expectTypeOf<Value>().toEqualTypeOf<
    | 'ClosedError'
    | 'DEFAULT_TIMING'
    | 'GatewayChatTransport'
    | 'GatewayConnection'
    | 'RefusedError'
    | 'TurnError'
    | 'mintId'
    | 'observe'
  >()
  expectTypeOf(all.mintId).toEqualTypeOf<() => string>()
  expectTypeOf(all.DEFAULT_TIMING).toEqualTypeOf<Timing>()
})

test('the transport is a ChatTransport, of messages of any type', () => {
  expectTypeOf<all.GatewayChatTransport>().toExtend<ChatTransport<UIMessage>>()
  expectTypeOf<all.GatewayChatTransport<MyMessage>>().toExtend<ChatTransport<MyMessage>>()
  const transport = new all.GatewayChatTransport()
  expectTypeOf<typeof transport.resumeStreamIsReplay>().toEqualTypeOf<true>()
  expectTypeOf(transport.client).toEqualTypeOf<string>()
  expectTypeOf(transport.gateway).toEqualTypeOf<all.GatewayConnection>()
  expectTypeOf(transport.connection).toEqualTypeOf<ConnectionStatus>()
  expectTypeOf(transport.subscribe).toEqualTypeOf<(listener: () => void) => () => void>()
  expectTypeOf(transport.onTurnEnd).toEqualTypeOf<(listener: (end: TurnEnd) => void) => () => void>()
  expectTypeOf(transport.position('c')).toEqualTypeOf<{ offset: number; last: number }>()
  expectTypeOf(transport.cancel('c', { turn: 't' })).toEqualTypeOf<Promise<CancelledTurn[]>>()
  expectTypeOf(transport.reconnect).toEqualTypeOf<() => void>()
  expectTypeOf(transport.close).toEqualTypeOf<() => void>()
  expectTypeOf(transport.sendMessages).returns.resolves.toEqualTypeOf<ReadableStream<UIMessageChunk>>()
  expectTypeOf(
    transport.reconnectToStream,
  ).returns.resolves.toEqualTypeOf<ReadableStream<UIMessageChunk> | null>()
})

test('its options', () => {
  type Given = GatewayChatTransportOptions<MyMessage>
  type Options = { [K in keyof Given]-?: Exclude<Given[K], undefined> }
  expectTypeOf<keyof Options>().toEqualTypeOf<
    | 'api'
    | 'body'
    | 'carriers'
    | 'client'
    | 'credentials'
    | 'fetch'
    | 'headers'
    | 'onAbort'
    | 'onTurnEnd'
    | 'overlap'
    | 'prepareSendMessagesRequest'
    | 'timing'
    | 'url'
    | 'WebSocket'
  >()
  // Each may be left out, and may be undefined, which is the same.
  expectTypeOf<{ [K in keyof Options]: undefined }>().toExtend<GatewayChatTransportOptions<MyMessage>>()
  expectTypeOf<Options['url']>().toEqualTypeOf<string | URL>()
  expectTypeOf<Options['carriers']>().toEqualTypeOf<readonly CarrierName[]>()
  expectTypeOf<Options['onAbort']>().toEqualTypeOf<'detach' | 'cancel'>()
  expectTypeOf<Options['onTurnEnd']>().toEqualTypeOf<(end: TurnEnd) => void>()
  expectTypeOf<Options['headers']>().toEqualTypeOf<Resolvable<Record<string, string> | Headers>>()
  expectTypeOf<Options['body']>().toEqualTypeOf<Resolvable<object>>()
  expectTypeOf<Options['credentials']>().toEqualTypeOf<Resolvable<RequestCredentials>>()
  expectTypeOf<Options['overlap']>().toEqualTypeOf<Resolvable<Overlap>>()
  expectTypeOf<Options['timing']>().toEqualTypeOf<Partial<Timing>>()
  expectTypeOf<Options['prepareSendMessagesRequest']>().toEqualTypeOf<PrepareSendMessagesRequest<MyMessage>>()
  expectTypeOf<Resolvable<1>>().toEqualTypeOf<1 | Promise<1> | (() => 1 | Promise<1>)>()
  expectTypeOf<PrepareOptions<MyMessage>['messages']>().toEqualTypeOf<MyMessage[]>()
  expectTypeOf<PrepareOptions<MyMessage>['trigger']>().toEqualTypeOf<
    'submit-message' | 'regenerate-message'
  >()
  expectTypeOf<{ body: object; overlap: 'reject' }>().toExtend<PreparedRequest>()
  expectTypeOf<PreparedRequest['overlap']>().toEqualTypeOf<Overlap | undefined>()
})

test('a connection of its own', () => {
  const connection = new all.GatewayConnection({ url: 'http://gateway' })
  expectTypeOf(connection.client).toEqualTypeOf<string>()
  expectTypeOf(connection.timing).toEqualTypeOf<Timing>()
  expectTypeOf(connection.status).toEqualTypeOf<ConnectionStatus>()
  expectTypeOf(connection.subscribe).toEqualTypeOf<(listener: () => void) => () => void>()
  expectTypeOf(connection.position('s')).toEqualTypeOf<{ offset: number; last: number }>()
  expectTypeOf(connection.attach).toEqualTypeOf<
    (session: string, listener: SessionListener, options?: AttachOptions) => () => void
  >()
  expectTypeOf(connection.send).toEqualTypeOf<(session: string, request: SendRequest) => Promise<Accepted>>()
  expectTypeOf(connection.unanswered('s')).toEqualTypeOf<string[]>()
  expectTypeOf(connection.cancel('s')).toEqualTypeOf<Promise<readonly CancelledTurn[]>>()
  expectTypeOf(connection.reconnect).toEqualTypeOf<() => void>()
  expectTypeOf(connection.close).toEqualTypeOf<() => void>()
  expectTypeOf<{ url: URL; carriers: ['sse']; client: 'c' }>().toExtend<GatewayConnectionOptions>()
  expectTypeOf<AttachOptions['from']>().toEqualTypeOf<'start' | 'running' | undefined>()
  expectTypeOf<{ body: object }>().toExtend<SendRequest>()
  expectTypeOf<{ record(record: SessionRecord, size: number): void }>().toExtend<SessionListener>()
  expectTypeOf<Parameters<NonNullable<SessionListener['attached']>>>().toEqualTypeOf<[Attached]>()
  expectTypeOf<Parameters<NonNullable<SessionListener['reset']>>>().toEqualTypeOf<[ResyncReason]>()
})

test('the words', () => {
  expectTypeOf<CarrierName>().toEqualTypeOf<'websocket' | 'sse' | 'long-poll'>()
  expectTypeOf<ConnectionPhase>().toEqualTypeOf<
    'idle' | 'connecting' | 'catching-up' | 'live' | 'offline' | 'closed'
  >()
  expectTypeOf<ConnectionStatus['state']>().toEqualTypeOf<ConnectionPhase>()
  expectTypeOf<Overlap>().toEqualTypeOf<'parallel' | 'reject' | 'interrupt'>()
  expectTypeOf<EndReason>().toEqualTypeOf<'complete' | 'cancelled' | 'error' | 'interrupted'>()
  expectTypeOf<ResyncReason>().toEqualTypeOf<'epoch-changed' | 'trimmed' | 'too-far-behind'>()
  expectTypeOf<CancelResult>().toEqualTypeOf<'cancelled' | 'already-ended' | 'interrupted' | 'unknown'>()
  expectTypeOf<CancelledTurn>().toEqualTypeOf<{ readonly turn: string; readonly result: CancelResult }>()
})

test('a record is one of three, by its type', () => {
  expectTypeOf<SessionRecord>().toEqualTypeOf<TurnStart | Chunk | TurnEndRecord>()
  expectTypeOf<Extract<SessionRecord, { type: 'turn-end' }>['reason']>().toEqualTypeOf<EndReason>()
  expectTypeOf<TurnStart['by']>().toEqualTypeOf<By>()
  expectTypeOf<TurnEndRecord['error']>().toEqualTypeOf<Failure | undefined>()
  expectTypeOf<Attached['turns']>().toEqualTypeOf<readonly TurnStatus[]>()
  expectTypeOf<Accepted['duplicate']>().toEqualTypeOf<boolean | undefined>()
})

test('the errors carry what was said', () => {
  expectTypeOf<all.TurnError>().toExtend<Error>()
  expectTypeOf<all.TurnError['code']>().toEqualTypeOf<string>()
  expectTypeOf<all.TurnError['status']>().toEqualTypeOf<number | undefined>()
  expectTypeOf<all.TurnError['reason']>().toEqualTypeOf<EndReason>()
  expectTypeOf<all.RefusedError['retryable']>().toEqualTypeOf<boolean>()
  expectTypeOf<all.RefusedError['retryAfter']>().toEqualTypeOf<number | undefined>()
  expectTypeOf<all.ClosedError['code']>().toEqualTypeOf<number>()
})

test('what is observed is as little of a chat as is needed', () => {
  expectTypeOf(all.observe<MyMessage>).parameters.toEqualTypeOf<
    [ObservableChat<MyMessage>, all.GatewayChatTransport<MyMessage>]
  >()
  expectTypeOf(all.observe).returns.toEqualTypeOf<() => void>()
})

test('the hook is useChat and more', () => {
  expectTypeOf(useGatewayChat<MyMessage>).parameters.toEqualTypeOf<[UseGatewayChatOptions<MyMessage>]>()
  expectTypeOf(useGatewayChat<MyMessage>).returns.toEqualTypeOf<UseGatewayChatHelpers<MyMessage>>()
  type Helpers = UseGatewayChatHelpers<MyMessage>
  expectTypeOf<Helpers['messages']>().toEqualTypeOf<MyMessage[]>()
  expectTypeOf<Helpers['connection']>().toEqualTypeOf<ConnectionStatus>()
  expectTypeOf<Helpers['lastTurnEnd']>().toEqualTypeOf<TurnEnd | undefined>()
  expectTypeOf<Helpers['stop']>().toEqualTypeOf<() => Promise<void>>()
  expectTypeOf<{ id: string; transport: all.GatewayChatTransport<MyMessage> }>().toExtend<
    UseGatewayChatOptions<MyMessage>
  >()
})
