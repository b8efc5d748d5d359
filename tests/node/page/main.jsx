// The smallest page of an `ai` 7 user: useChat, the stock transport, `resume: true`; or useGatewayChat.
//
// The query names the chat (`?chat=c1`), and may choose `transport=websocket` or `transport=gateway`, `resume=false`,
// `strict=true` (React's StrictMode) and, of the gateway's transport, `carriers=sse,long-poll` and `timing={"helloMs":500}`.
import { StrictMode, useState } from 'react'
import { createRoot } from 'react-dom/client'
import { DefaultChatTransport, WebSocketChatTransport } from 'ai7'
import { useChat } from 'react7'
import { GatewayChatTransport, useGatewayChat } from '../dist/gateway7.mjs'

const query = new URLSearchParams(location.search)
const chatId = query.get('chat') ?? 'page'
const chatUrl = `/api/chat/${encodeURIComponent(chatId)}`

const TRANSPORTS = {
  http: () => new DefaultChatTransport({ api: '/api/chat' }),
  websocket: () => new WebSocketChatTransport({ url: '/api/chat' }),
  gateway: () => new GatewayChatTransport({
    carriers: query.get('carriers')?.split(','),
    timing: JSON.parse(query.get('timing') ?? '{}'),
  }),
}
const kind = query.get('transport') ?? 'http'
const transport = TRANSPORTS[kind]()
const useThisChat = kind === 'gateway' ? useGatewayChat : useChat

function save({ messages }) {
  void fetch(`${chatUrl}/messages`, { method: 'PUT', body: JSON.stringify(messages), keepalive: true })
}

function Part({ part }) {
  if (part.type === 'text') return <span>{part.text}</span>
  if (part.type === 'reasoning') return <span className="reasoning">{part.text}</span>
  if (part.type.startsWith('tool-')) return <span className="tool">{`[${part.type} ${part.state}] `}</span>
  return null
}

/** What only the gateway's transport can tell. */
function Connection({ connection: { state, carrier }, lastTurnEnd }) {
  const { offset, last } = transport.position(chatId)
  return (
    <p>
      Connection: <b data-testid="connection">{state}</b> by <b data-testid="carrier">{carrier}</b>,
      at <b data-testid="offset">{offset}</b> of {last}; last end: <b data-testid="end">{lastTurnEnd?.reason ?? 'none'}</b>
    </p>
  )
}

function Page({ history }) {
  const chat = useThisChat({
    id: chatId, messages: history, transport, resume: query.get('resume') !== 'false', onFinish: save,
  })
  const { messages, status, error, sendMessage, stop } = chat
  const [text, setText] = useState('')
  const send = event => {
    event.preventDefault()
    void sendMessage({ text })
    setText('')
  }
  const stopTurn = () => {
    // On the HTTP wire a closed connection is only a detach; the stop URL is what stops the model.
    if (kind === 'http') void fetch(`${chatUrl}/stop`, { method: 'POST' })
    void stop()
  }
  return (
    <>
      <p>Status: <b data-testid="status">{status}</b></p>
      {kind === 'gateway' && <Connection {...chat} />}
      {error && <p role="alert" data-testid="error">{error.message}</p>}
      <section data-testid="messages">
        {messages.map((message, index) => (
          <article key={message.id} data-testid={`message-${index}`} data-role={message.role}>
            {message.parts.map((part, partIndex) => <Part key={partIndex} part={part} />)}
          </article>
        ))}
      </section>
      <form onSubmit={send}>
        <input data-testid="input" value={text} onChange={event => setText(event.target.value)} />
        <button data-testid="send">Send</button>
        <button type="button" data-testid="stop" onClick={stopTurn}>Stop</button>
      </form>
      <pre hidden data-testid="json">{JSON.stringify(messages)}</pre>
    </>
  )
}

const history = await (await fetch(`${chatUrl}/messages`)).json()
const page = <Page history={history} />
createRoot(document.getElementById('root')).render(query.get('strict') === 'true' ? <StrictMode>{page}</StrictMode> : page)
