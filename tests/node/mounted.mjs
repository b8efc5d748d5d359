// One chat of a page: a component with the real hook of the major in argv, and everything that can be seen of it.
import './jsdom-page.mjs'

const major = Number(process.argv[2])
const ai = await import(`ai${major}`)
const { Chat, useChat } = await import(`react${major}`)
const gateway = await import(`./dist/gateway${major}.mjs`)
const { createElement, StrictMode, useEffect, useState } = await import('react')
const { createRoot } = await import('react-dom/client')

const HOOKS = { useChat, useGatewayChat: gateway.useGatewayChat }

/** The transports of this page that have a name. */
const named = new Map()

function makeTransport(facts) {
  const { api, transport, headers, body, messageOnly } = facts
  if (transport === 'gateway') return gatewayTransport(facts)
  if (transport === 'websocket') return new ai.WebSocketChatTransport({ url: api, headers, body })
  const prepareSendMessagesRequest = ({ id, messages }) => ({ body: { id, message: messages.at(-1) } })
  return new ai.DefaultChatTransport({ api, headers, body, ...(messageOnly && { prepareSendMessagesRequest }) })
}

/** All options are the transport's own, but `transportName`, `path` (its `api`) and what stands for a function. */
function gatewayTransport({ api, transportName, path, resolvable, messageOnly, prepared, ...facts }) {
  if (transportName && named.has(transportName)) return named.get(transportName)
  const { url = new URL(api).origin, carriers, timing, onAbort, client, overlap, headers, body, credentials } = facts
  const request = { overlap, headers, body, credentials }
  const asked = Object.entries(request).map(([name, value]) => [name, async () => value])
  const transport = new gateway.GatewayChatTransport({
    url, carriers, timing, onAbort, client, api: path,
    ...(resolvable ? Object.fromEntries(asked) : request),
    ...((messageOnly || prepared) && {
      prepareSendMessagesRequest: ({ id, messages, body, requestMetadata }) =>
        ({ body: { ...body, id, message: messages.at(-1), requestMetadata }, ...prepared }),
    }),
  })
  if (transportName) named.set(transportName, transport)
  return transport
}

/** Everything a page can see of one chat, and the waits for it. */
export class Mounted {
  /** What its callbacks were called with. Shown when React has rendered all that came before, which may be later. */
  #told = { finishes: [], errors: [], data: [], toolCalls: [], ends: [] }
  statuses = []
  connections = []
  #waits = new Set()
  #facts

  constructor(facts) {
    this.#facts = facts
    this.answers = facts.answerTools ?? {}
    this.transport = makeTransport(facts)
    /** With `inline`: those made while rendering, the first one included. */
    this.transports = [this.transport]
    this.isGateway = facts.transport === 'gateway'
    if (this.isGateway) this.#watchConnection()
    this.show(facts.messages)
  }

  /** Renders the component; after `hide`, anew, as on a way to another page and back: only an external chat lives on. */
  show(messages) {
    const { chatId, resume = false, external = false, autoSend = true, strict, hook } = this.#facts
    const init = {
      id: chatId,
      messages,
      transport: this.transport,
      onFinish: finish => this.#note('finishes', this.#finishSeen(finish)),
      onError: error => this.#note('errors', describe(error)),
      onData: part => this.#note('data', part),
      onToolCall: ({ toolCall }) => this.#toolCalled(toolCall),
      ...(autoSend && { sendAutomaticallyWhen: seen => isAnswered(seen) }),
    }
    if (hook === 'observe') return this.#showWithoutReact(new Chat(init))
    const useHook = HOOKS[hook ?? (this.isGateway ? 'useGatewayChat' : 'useChat')]
    if (external) this.external ??= new Chat(init)
    const options = external ? { chat: this.external, transport: this.transport, resume } : { ...init, resume }
    this.root = createRoot(document.body.appendChild(document.createElement('div')))
    this.committed = new Promise(resolve => { this.onCommit = resolve })
    const component = createElement(() => this.#render(useHook, options))
    this.root.render(strict ? createElement(StrictMode, null, component) : component)
  }

  hide() {
    if (this.root) this.root.unmount()
    else this.unobserve()
  }

  #render(useHook, options) {
    const chat = useHook(this.#facts.inline ? { ...options, transport: this.#makeInline() } : options)
    const [told, tell] = useState(() => this.#copyTold())
    this.chat = chat
    this.tell = tell
    useEffect(() => {
      this.#saw(chat, told)
      this.onCommit()
    })
    return createElement('pre', null, JSON.stringify(chat.messages))
  }

  /** As in the examples of the SDK, `useChat({ transport: new ... })`: another one with each rendering. */
  #makeInline() {
    if (this.chat) this.transports.push(makeTransport(this.#facts))
    return this.transports.at(-1)
  }

  /** A bare `Chat`, as another framework would have it. */
  #showWithoutReact(chat) {
    this.chat = chat
    this.tell = () => this.#saw(chat)
    for (const what of ['Status', 'Messages', 'Error']) chat[`~register${what}Callback`](() => this.#saw(chat))
    this.#saw(chat)
    this.unobserve = gateway.observe(chat, this.transport)
  }

  #saw({ status, messages, error, lastTurnEnd }, told = this.#copyTold()) {
    if (this.statuses.at(-1) !== status) this.statuses.push(status)
    this.seen = { status, messages, error: error && describe(error), lastTurnEnd, ...told }
    this.#check()
  }

  #copyTold() {
    return Object.fromEntries(Object.entries(this.#told).map(([name, list]) => [name, [...list]]))
  }

  #watchConnection() {
    const { transport } = this
    const { chatId } = this.#facts
    this.connections.push(connectionOf(transport))
    transport.subscribe(() => {
      this.connections.push(connectionOf(transport))
      this.#check()
    })
    transport.onTurnEnd(end => end.chatId === chatId && this.#note('ends', end))
  }

  #finishSeen({ message, isAbort, isDisconnect, isError, finishReason }) {
    return { messageId: message?.id, isAbort, isDisconnect, isError, finishReason }
  }

  #note(name, value) {
    this.#told[name].push(value)
    this.tell(this.#copyTold())
  }

  #toolCalled(toolCall) {
    this.#note('toolCalls', toolCall)
    if (!Object.hasOwn(this.answers, toolCall.toolName)) return
    // Not awaited: the documentation warns of the deadlock.
    void this.chat.addToolOutput({
      tool: toolCall.toolName, toolCallId: toolCall.toolCallId, output: this.answers[toolCall.toolName],
    })
  }

  state() {
    const { seen, statuses, connections, transport, transports } = this
    return {
      ...seen, statuses,
      ...(this.isGateway && {
        connections,
        connection: connectionOf(transport),
        position: transport.position(this.#facts.chatId),
        client: transport.client,
        transports: transports.length,
        connected: transports.filter(({ connection }) => connection.state !== 'idle').length,
      }),
    }
  }

  #check() {
    for (const wait of this.#waits) wait()
  }

  /** Starts a turn and returns when the page shows it: a `wait` for `ready` then means its end. */
  async begin(turn) {
    const { finishes, errors } = this.#told
    const ended = finishes.length + errors.length
    start(turn)
    const isShown = state => state.status !== 'ready' || state.finishes.length + state.errors.length > ended
    await this.until('the turn begun', isShown, 20)
  }

  /** The state as soon as `isMet` by it; `name` is for the error when that takes too long. */
  until(name, isMet, timeoutSeconds) {
    const { promise, resolve, reject } = Promise.withResolvers()
    const wait = () => isMet(this.state()) && resolve(this.state())
    const tooLong = () => reject(new Error(`unable to see ${name}; saw ${JSON.stringify(this.state())}`))
    const timer = setTimeout(tooLong, timeoutSeconds * 1000)
    this.#waits.add(wait)
    if (this.seen) wait()
    return promise.finally(() => {
      clearTimeout(timer)
      this.#waits.delete(wait)
    })
  }
}

/** All calls answered, or all approvals given (which 5 does not have). */
function isAnswered(seen) {
  const isApproved = ai.lastAssistantMessageIsCompleteWithApprovalResponses ?? (() => false)
  return ai.lastAssistantMessageIsCompleteWithToolCalls(seen) || isApproved(seen)
}

/** Calls that run as long as their turn are started and not awaited; a `wait` sees how they go. */
export function start(promise) {
  Promise.resolve(promise).catch(error => console.error('a call of useChat rejected', error))
}

/** An error of the gateway's client has more to tell than its message. */
export function describe({ name, message, code, status, reason, retryAfter, turn }) {
  return { name, message, ...(typeof code === 'string' && { code, status, reason, retryAfter, turn }) }
}

function connectionOf({ connection: { state, carrier, error } }) {
  return { state, carrier, ...(error && { error: describe(error) }) }
}
