// The real `useChat` of the major in argv, in a jsdom page, driven by JSON lines.
//
//   node client.mjs <5|6|7>
//
// Killing this process is a reload or a crashed tab: sockets close and no React cleanup runs.
import { setOnline, wake } from './jsdom-page.mjs'
import { Mounted, start } from './mounted.mjs'
import { serveCommands } from './stdio.mjs'

const textOf = message => (message?.parts ?? []).map(part => (part.type === 'text' ? part.text : '')).join('')
const isSame = (one, other) => JSON.stringify(one) === JSON.stringify(other)
const isPartOf = (whole, part) => Object.entries(part).every(([name, value]) => isSame(whole[name], value))
const isOneOf = (value, wanted) => [wanted].flat().includes(value)

const CONDITIONS = {
  status: (state, wanted) => isOneOf(state.status, wanted),
  minMessages: (state, wanted) => state.messages.length >= wanted,
  role: (state, wanted) => state.messages.at(-1)?.role === wanted,
  text: (state, wanted) => textOf(state.messages.at(-1)).includes(wanted),
  anyText: (state, wanted) => state.messages.some(message => textOf(message).includes(wanted)),
  part: (state, wanted) => (state.messages.at(-1)?.parts ?? []).some(part => isPartOf(part, wanted)),
  finishes: (state, wanted) => state.finishes.length >= wanted,
  errors: (state, wanted) => state.errors.length >= wanted,
  data: (state, wanted) => state.data.length >= wanted,
  toolCalls: (state, wanted) => state.toolCalls.length >= wanted,
  ends: (state, wanted) => state.ends.length >= wanted,
  connection: (state, wanted) => isOneOf(state.connection.state, wanted),
  carrier: (state, wanted) => isOneOf(state.connection.carrier, wanted),
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

const COMMANDS = {
  async mount({ chat: name = 'main', ...facts }) {
    if (mounted.has(name)) throw new Error(`unable to mount ${name}; it is mounted`)
    const fresh = new Mounted(facts)
    mounted.set(name, fresh)
    await fresh.committed
    return fresh.state()
  },
  unmount({ chat: name = 'main' }) {
    find(name).hide()
    mounted.delete(name)
  },
  /** The component goes and comes back; its transport stays, as one made outside of it does. */
  async remount({ chat, messages }) {
    const page = find(chat)
    page.hide()
    page.show(messages)
    await page.committed
    return page.state()
  },
  send({ chat: name, text, messageId, ...options }) {
    const { chat } = find(name)
    return find(name).begin(chat.sendMessage({ text, ...(messageId && { messageId }) }, options))
  },
  /** The hook's own: that of `useGatewayChat` cancels. */
  stop: ({ chat }) => find(chat).chat.stop(),
  cancel: ({ chat, chatId, ...options }) => find(chat).transport.cancel(chatId, options),
  reconnect: ({ chat }) => find(chat).transport.reconnect(),
  closeTransport: ({ chat }) => find(chat).transport.close(),
  regenerate: ({ chat, ...options }) => find(chat).begin(find(chat).chat.regenerate(options)),
  resumeStream: ({ chat }) => start(find(chat).chat.resumeStream()),
  setMessages: ({ chat, messages }) => find(chat).chat.setMessages(messages),
  clearError: ({ chat }) => find(chat).chat.clearError(),
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
  setOnline: ({ online }) => setOnline(online),
  wake: ({ event = 'visibilitychange' }) => wake(event),
}

serveCommands(COMMANDS)
