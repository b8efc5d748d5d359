// The smallest page of an `ai` 7 user: useChat, the stock transport, `resume: true`.
//
// The query names the chat (`?chat=c1`), and may choose `transport=websocket` or `resume=false`.
import { useState } from 'react'
import { createRoot } from 'react-dom/client'
import { DefaultChatTransport, WebSocketChatTransport } from 'ai7'
import { useChat } from 'react7'

const query = new URLSearchParams(location.search)
const chatId = query.get('chat') ?? 'page'
const chatUrl = `/api/chat/${encodeURIComponent(chatId)}`
const isSocket = query.get('transport') === 'websocket'
const transport = isSocket
  ? new WebSocketChatTransport({ url: '/api/chat' })
  : new DefaultChatTransport({ api: '/api/chat' })

function save({ messages }) {
  void fetch(`${chatUrl}/messages`, { method: 'PUT', body: JSON.stringify(messages), keepalive: true })
}

function Part({ part }) {
  if (part.type === 'text') return <span>{part.text}</span>
  if (part.type === 'reasoning') return <span className="reasoning">{part.text}</span>
  if (part.type.startsWith('tool-')) return <span className="tool">{`[${part.type} ${part.state}] `}</span>
  return null
}

function Page({ history }) {
  const { messages, status, error, sendMessage, stop } = useChat({
    id: chatId, messages: history, transport, resume: query.get('resume') !== 'false', onFinish: save,
  })
  const [text, setText] = useState('')
  const send = event => {
    event.preventDefault()
    void sendMessage({ text })
    setText('')
  }
  const stopTurn = () => {
    // On the HTTP wire a closed connection is only a detach; the stop URL is what stops the model.
    if (!isSocket) void fetch(`${chatUrl}/stop`, { method: 'POST' })
    void stop()
  }
  return (
    <>
      <p>Status: <b data-testid="status">{status}</b></p>
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
createRoot(document.getElementById('root')).render(<Page history={history} />)
