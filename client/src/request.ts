/** What is sent for a turn: the body that `DefaultChatTransport` would have posted. */
import type { ChatTransport, UIMessage } from 'ai'
import type { SendRequest } from './connection.js'
import type { Overlap } from './protocol.js'

/** A value, or how to get it: asked for at each send. */
export type Resolvable<T> = T | Promise<T> | (() => T | Promise<T>)

type SendOptions<M extends UIMessage> = Parameters<ChatTransport<M>['sendMessages']>[0]

/** What `prepareSendMessagesRequest` gets: the same as from the SDK's own transports. */
export interface PrepareOptions<M extends UIMessage> {
  readonly id: string
  readonly messages: M[]
  readonly requestMetadata: unknown
  // biome-ignore lint/suspicious/noExplicitAny: the SDK's own type, so that one function serves both
  readonly body: Record<string, any> | undefined
  readonly credentials: RequestCredentials | undefined
  readonly headers: HeadersInit | undefined
  readonly api: string
  readonly trigger: 'submit-message' | 'regenerate-message'
  readonly messageId: string | undefined
}

/** What it gives back. `body` replaces the whole body. */
export interface PreparedRequest {
  readonly body: object
  readonly headers?: HeadersInit | undefined
  /** Taken, so that one function serves the SDK's transports too; a connection's are those of the transport. */
  readonly credentials?: RequestCredentials | undefined
  readonly api?: string | undefined
  readonly overlap?: Overlap | undefined
}

export type PrepareSendMessagesRequest<M extends UIMessage> = (
  options: PrepareOptions<M>,
) => PreparedRequest | PromiseLike<PreparedRequest>

export interface RequestOptions<M extends UIMessage> {
  /** Which of the gateway's chat paths (`GATEWAY_CHAT_PATH`). Default: its first. */
  readonly api?: string | undefined
  /** For the backend, and for the requests of the HTTP carriers. */
  readonly headers?: Resolvable<Record<string, string> | Headers> | undefined
  /** Members beside `id`, `messages`, `trigger` and `messageId`. */
  readonly body?: Resolvable<object> | undefined
  /** Of the HTTP carriers' requests. */
  readonly credentials?: Resolvable<RequestCredentials> | undefined
  /** What a send does while another turn runs. Default: as the gateway is set (`parallel`). */
  readonly overlap?: Resolvable<Overlap> | undefined
  readonly prepareSendMessagesRequest?: PrepareSendMessagesRequest<M> | undefined
}

/** Names in lower case, and none without a value, as the SDK gives them. */
export function plainHeaders(headers: HeadersInit | undefined): Record<string, string> {
  const isList = headers instanceof Headers || Array.isArray(headers)
  const named: [string, string | undefined][] = isList ? [...headers] : Object.entries(headers ?? {})
  const given = named.filter((one): one is [string, string] => one[1] !== undefined && one[1] !== null)
  return Object.fromEntries(given.map(([name, value]) => [name.toLowerCase(), value]))
}

export async function resolve<T>(value: Resolvable<T> | undefined): Promise<T | undefined> {
  return typeof value === 'function' ? (value as () => T | Promise<T>)() : value
}

/** Everything of a send but its turn. */
export async function makeRequest<M extends UIMessage>(
  options: RequestOptions<M>,
  send: SendOptions<M>,
): Promise<SendRequest> {
  const { chatId: id, messages, trigger, messageId, metadata } = send
  const extra = { ...(await resolve(options.body)), ...send.body }
  const base = { ...plainHeaders(await resolve(options.headers)), ...plainHeaders(send.headers) }
  const overlap = await resolve(options.overlap)
  const prepared = await options.prepareSendMessagesRequest?.({
    api: options.api ?? '/api/chat',
    id,
    messages,
    body: extra,
    headers: base,
    credentials: await resolve(options.credentials),
    requestMetadata: metadata,
    trigger,
    messageId,
  })
  const api = prepared?.api ?? options.api
  const headers = prepared?.headers === undefined ? base : plainHeaders(prepared.headers)
  const chosen = prepared?.overlap ?? overlap
  return {
    body: prepared?.body ?? { ...extra, id, messages, trigger, messageId },
    ...(api !== undefined && { path: new URL(api, 'http://gateway').pathname }),
    ...(chosen !== undefined && { overlap: chosen }),
    ...(Object.keys(headers).length > 0 && { headers }),
  }
}
