// The real `useChat` of the major in argv, in a jsdom page, driven by JSON lines.
//
//   node client.mjs <5|6|7>
//
// Killing this process is a reload or a crashed tab: sockets close and no React cleanup runs.
import { JSDOM } from 'jsdom'
import { serveCommands } from './stdio.mjs'

const major = Number(process.argv[2])
installPage()
const ai = await import(`ai${major}`)
const { Chat, useChat } = await import(`react${major}`)
const { createElement, useEffect } = await import('react')
const { createRoot } = await import('react-dom/client')

/** Gives React a document; fetch, streams and WebSocket stay Node's own, which are the web's. */
function installPage() {
  const { window } = new JSDOM('<!doctype html><body></body>', { url: 'http://127.0.0.1/', pretendToBeVisual: true })
  const { fetch, ReadableStream, TextDecoderStream, TransformStream, WebSocket, AbortController } = globalThis
  Object.assign(window, { fetch, ReadableStream, TextDecoderStream, TransformStream, WebSocket, AbortController })
  Object.assign(globalThis, { window, document: window.document, AI_SDK_LOG_WARNINGS: false })
}

function makeTransport({ api, transport, headers, body, messageOnly }) {
  if (transport === 'websocket') return new ai.WebSocketChatTransport({ url: api, headers, body })
  const prepareSendMessagesRequest = ({ id, messages }) => ({ body: { id, message: messages.at(-1) } })
  return new ai.DefaultChatTransport({ api, headers, body, ...(messageOnly && { prepareSendMessagesRequest }) })
}

/** Everything a page can see of one chat, and the waits for it. */
class Mounted {
  finishes = []
  errors = []
  data = []
  toolCalls = []
  statuses = []
  #waits = new Set()

  constructor(facts) {
    const { chatId, messages, resume = false, external = false, autoSend = true } = facts
    this.answers = facts.answerTools ?? {}
    const init = {
      id: chatId,
      messages,
      transport: makeTransport(facts),
      onFinish: finish => this.#note(this.finishes, this.#finishSeen(finish)),
      onError: error => this.#note(this.errors, describe(error)),
      onData: part => this.#note(this.data, part),
      onToolCall: ({ toolCall }) => this.#toolCalled(toolCall),
      ...(autoSend && { sendAutomaticallyWhen: seen => isAnswered(seen) }),
    }
    this.options = external ? { chat: new Chat(init), resume } : { ...init, resume }
    this.root = createRoot(document.body.appendChild(document.createElement('div')))
    this.committed = new Promise(resolve => { this.onCommit = resolve })
    this.root.render(createElement(() => this.#render()))
  }

  #render() {
    const chat = useChat(this.options)
    this.chat = chat
    useEffect(() => {
      if (this.statuses.at(-1) !== chat.status) this.statuses.push(chat.status)
      this.seen = { status: chat.status, messages: chat.messages, error: chat.error && describe(chat.error) }
      this.onCommit()
      this.#check()
    })
    return createElement('pre', null, JSON.stringify(chat.messages))
  }

  #finishSeen({ message, isAbort, isDisconnect, isError, finishReason }) {
    return { messageId: message?.id, isAbort, isDisconnect, isError, finishReason }
  }

  #note(list, value) {
    list.push(value)
    this.#check()
  }

  #toolCalled(toolCall) {
    this.#note(this.toolCalls, toolCall)
    if (!Object.hasOwn(this.answers, toolCall.toolName)) return
    // Not awaited: the documentation warns of the deadlock.
    void this.chat.addToolOutput({
      tool: toolCall.toolName, toolCallId: toolCall.toolCallId, output: this.answers[toolCall.toolName],
    })
  }

  state() {
    const { finishes, errors, data, toolCalls, statuses } = this
    return { ...this.seen, finishes, errors, data, toolCalls, statuses }
  }

  #check() {
    for (const wait of this.#waits) wait()
  }

  /** Starts a turn and returns when the page shows it: a `wait` for `ready` then means its end. */
  async begin(turn) {
    const ended = this.finishes.length + this.errors.length
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

function describe(error) {
  return { name: error.name, message: error.message }
}

const textOf = message => (message?.parts ?? []).map(part => (part.type === 'text' ? part.text : '')).join('')
const isSame = (one, other) => JSON.stringify(one) === JSON.stringify(other)
const isPartOf = (whole, part) => Object.entries(part).every(([name, value]) => isSame(whole[name], value))

const CONDITIONS = {
  status: (state, wanted) => [wanted].flat().includes(state.status),
  minMessages: (state, wanted) => state.messages.length >= wanted,
  role: (state, wanted) => state.messages.at(-1)?.role === wanted,
  text: (state, wanted) => textOf(state.messages.at(-1)).includes(wanted),
  part: (state, wanted) => (state.messages.at(-1)?.parts ?? []).some(part => isPartOf(part, wanted)),
  finishes: (state, wanted) => state.finishes.length >= wanted,
  errors: (state, wanted) => state.errors.length >= wanted,
  data: (state, wanted) => state.data.length >= wanted,
  toolCalls: (state, wanted) => state.toolCalls.length >= wanted,
}

function meets(state, wanted) {
  return Object.entries(wanted).every(([name, value]) => CONDITIONS[name](state, value))
}

const mounted = new Map()

function find(name = 'main') {
  const found = mounted.get(name)
  if (!found) throw new Error(`unable to use chat ${name}; mount it first`)
  return found
}

/** Calls that run as long as their turn are started here and not awaited; `wait` sees how they go. */
function start(promise) {
  Promise.resolve(promise).catch(error => console.error('a call of useChat rejected', error))
}

const COMMANDS = {
  async mount({ chat: name = 'main', ...facts }) {
    if (mounted.has(name)) throw new Error(`unable to mount ${name}; it is mounted`)
    const fresh = new Mounted(facts)
    mounted.set(name, fresh)
    await fresh.committed
    return fresh.state()
  },
  unmount({ chat: name = 'main' }) {
    find(name).root.unmount()
    mounted.delete(name)
  },
  send({ chat: name, text, messageId, ...options }) {
    const { chat } = find(name)
    return find(name).begin(chat.sendMessage({ text, ...(messageId && { messageId }) }, options))
  },
  stop: ({ chat }) => find(chat).chat.stop(),
  regenerate: ({ chat, ...options }) => find(chat).begin(find(chat).chat.regenerate(options)),
  resumeStream: ({ chat }) => start(find(chat).chat.resumeStream()),
  setMessages: ({ chat, messages }) => find(chat).chat.setMessages(messages),
  addToolOutput: ({ chat, ...output }) => start(find(chat).chat.addToolOutput(output)),
  approve({ chat, approvalId, approved, reason }) {
    start(find(chat).chat.addToolApprovalResponse({ id: approvalId, approved, reason }))
  },
  state: ({ chat }) => find(chat).state(),
  wait({ chat, timeoutSeconds = 20, ...wanted }) {
    return find(chat).until(JSON.stringify(wanted), state => meets(state, wanted), timeoutSeconds)
  },
  /** The network of this page dies: every connection is reset, React lives on. */
  cut() {
    const sockets = process._getActiveHandles().filter(handle => handle.remotePort !== undefined)
    for (const socket of sockets) socket.destroy()
    return sockets.length
  },
}

serveCommands(COMMANDS)
