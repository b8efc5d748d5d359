/** `useGatewayChat`: `useChat`, with what others do, and a Stop that stops. */
import { Chat, type UseChatHelpers, useChat } from '@ai-sdk/react'
import type { ChatInit, UIMessage } from 'ai'
import { type RefObject, useCallback, useEffect, useRef, useState, useSyncExternalStore } from 'react'
import type { ConnectionStatus } from './connection.js'
import type { TurnEnd } from './errors.js'
import { observe } from './observe.js'
import type { GatewayChatTransport } from './transport.js'

/** How long the turn's end may take to arrive behind the answer of its cancel, and a cancel on a network that is away. */
const STOP_PATIENCE_MS = 2_000
const LOOK_MS = 20

interface CommonOptions<M extends UIMessage> {
  /** Make it once, outside of the component or in `useMemo`; it may serve many chats. */
  readonly transport: GatewayChatTransport<M>
  /** Wait so long between two renderings, in milliseconds. */
  readonly throttle?: number | undefined
  /** The name that `ai` 5 and 6 have for it. */
  readonly experimental_throttle?: number | undefined
}

/** As `useChat`'s; `resume` is always on, since what runs when the page is loaded is shown like what others do. */
export type UseGatewayChatOptions<M extends UIMessage = UIMessage> = CommonOptions<M> &
  (
    | ({ readonly chat: Chat<M> } & Partial<Record<keyof Omit<ChatInit<M>, 'transport'>, never>>)
    | Omit<ChatInit<M>, 'transport'>
  )

export type UseGatewayChatHelpers<M extends UIMessage = UIMessage> = UseChatHelpers<M> & {
  /** The state of the connection, for a UI. */
  connection: ConnectionStatus
  /** How the newest turn ended, whoever started and whoever cancelled it; undefined as long as none has. */
  lastTurnEnd: TurnEnd | undefined
  /** Cancel what runs in this chat, whoever started it. Resolves when nothing of it streams any more. */
  stop: () => Promise<void>
}

/**
 * `useChat` of the installed AI SDK on a gateway. An unmounted component ends nothing; `stop()` does.
 *
 * @throws TypeError - From `stop()`, when the network is away for long; from then on it is not repeated.
 */
export function useGatewayChat<M extends UIMessage = UIMessage>(
  options: UseGatewayChatOptions<M>,
): UseGatewayChatHelpers<M> {
  const { transport: _, experimental_throttle, throttle = experimental_throttle, ...init } = options
  const latest = useRef(init)
  latest.current = init
  // As `useChat` does: the first transport serves a chat for good, so that one made while rendering is no new chat each
  // time; and the chat is made here, since an unmount of one that `useChat` has made fires its abort signal (`ai` 7).
  const { chat, transport } = useKept(options, latest)
  const helpers = useChat<M>({ chat, ...(throttle !== undefined && { experimental_throttle: throttle }) })
  useEffect(() => {
    const disown = own(transport, chat.id, latest)
    const end = observe(chat, transport)
    return () => {
      disown()
      end()
    }
  }, [chat, transport])
  const connection = useSyncExternalStore(
    transport.subscribe,
    () => transport.connection,
    () => transport.connection,
  )
  const lastTurnEnd = useLastTurnEnd(chat.id, transport)
  const stop = useCallback(() => stopChat(chat, transport), [chat, transport])
  return { ...helpers, stop, connection, lastTurnEnd }
}

interface Kept<M extends UIMessage> {
  readonly given: Chat<M> | undefined
  readonly id: string | undefined
  readonly chat: Chat<M>
  readonly transport: GatewayChatTransport<M>
}

/** The chat of this component and its transport, until another chat is asked for. */
function useKept<M extends UIMessage>(
  options: UseGatewayChatOptions<M>,
  latest: { readonly current: Omit<UseGatewayChatOptions<M>, keyof CommonOptions<M>> },
): Kept<M> {
  const given = 'chat' in options ? options.chat : undefined
  const id = 'chat' in options ? undefined : options.id
  const kept = useRef<Kept<M> | undefined>(undefined) as RefObject<Kept<M> | undefined>
  if (!kept.current || kept.current.given !== given || kept.current.id !== id) {
    const { transport } = options
    kept.current = { given, id, transport, chat: given ?? new Chat<M>(withLatest(latest, transport)) }
  }
  return kept.current
}

/** Which of several chat objects of one id calls back, by transport. */
const owners = new WeakMap<object, Map<string, object>>()

/**
 * Another object of this id may still stream, whose component is gone: it calls back no more, or all is told twice, and
 * tools run twice. Returns the end of it.
 */
function own(transport: object, id: string, latest: object): () => void {
  const ids = owners.get(transport) ?? new Map<string, object>()
  owners.set(transport, ids.set(id, latest))
  return () => ids.get(id) === latest && ids.delete(id)
}

/** The chat is made once; what it calls is always the newest rendering's. */
function withLatest<M extends UIMessage>(
  latest: { readonly current: Omit<UseGatewayChatOptions<M>, keyof CommonOptions<M>> },
  transport: GatewayChatTransport<M>,
): ChatInit<M> {
  const init = () => latest.current as ChatInit<M>
  const { id = '' } = init()
  const current = () => ((owners.get(transport)?.get(id) ?? latest) === latest ? init() : undefined)
  return {
    ...init(),
    transport,
    onError: (error) => current()?.onError?.(error),
    onData: (part) => current()?.onData?.(part),
    onFinish: (finish) => current()?.onFinish?.(finish),
    onToolCall: (call) => current()?.onToolCall?.(call),
    sendAutomaticallyWhen: (seen) => current()?.sendAutomaticallyWhen?.(seen) ?? false,
  }
}

function useLastTurnEnd<M extends UIMessage>(
  chatId: string,
  transport: GatewayChatTransport<M>,
): TurnEnd | undefined {
  const [end, setEnd] = useState<TurnEnd>()
  useEffect(
    () => transport.onTurnEnd((ended) => ended.chatId === chatId && setEnd(ended)),
    [chatId, transport],
  )
  return end?.chatId === chatId ? end : undefined
}

/** Cancel, and let the turn's own end settle the chat: it closes open parts, on every device alike. */
async function stopChat<M extends UIMessage>(
  chat: Chat<M>,
  transport: GatewayChatTransport<M>,
): Promise<void> {
  const streams = transport.streams(chat.id)
  // A turn that was asked for since, here or elsewhere, is none of this stop's.
  const isTheSame = () => transport.streams(chat.id) === streams
  const cancelled = transport.cancel(chat.id)
  // The picture does not wait for a network that is away; the cancel goes on by itself.
  await Promise.race([cancelled, delay(STOP_PATIENCE_MS)]).catch(() => {})
  const until = performance.now() + STOP_PATIENCE_MS
  const isBusy = () => chat.status === 'submitted' || chat.status === 'streaming'
  while (isTheSame() && isBusy() && performance.now() < until) await delay(LOOK_MS)
  if (isTheSame()) await chat.stop()
  await cancelled
}

function delay(milliseconds: number): Promise<void> {
  return new Promise((resolve) => setTimeout(resolve, milliseconds))
}
