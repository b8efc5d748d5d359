/**
 * The network as a browser shows it to a page: its WebSocket and its fetch, scripted. What a test does not say does not
 * happen. None of it is the client's own code.
 */
import type { Command, Said } from '../../src/protocol.js'

type Line = Said | Record<string, unknown>

/** A browser's WebSocket that does what the test says. */
export class ScriptedSocket {
  readonly url: URL
  readonly protocols: string | string[] | undefined
  readonly sent: Command[] = []
  readyState = 0
  /** Of what was sent, what the network has not taken yet. */
  bufferedAmount = 0
  onmessage: ((event: { data: unknown }) => void) | null = null
  onclose: ((event: { code: number; reason: string }) => void) | null = null
  onerror: ((event: unknown) => void) | null = null

  constructor(url: string | URL, protocols?: string | string[]) {
    this.url = new URL(url)
    this.protocols = protocols
  }

  send(text: string): void {
    if (this.readyState !== 1) throw new Error('unable to send; the socket is not open')
    this.sent.push(JSON.parse(text))
  }

  close(): void {
    this.readyState = 3
  }

  get isClosed(): boolean {
    return this.readyState === 3
  }

  // -- what happens on the other side

  /** It opens, and the gateway says hello. */
  greets(hello: object = {}): void {
    this.readyState = 1
    this.says({ type: 'hello', protocol: 1, node: 'n', client: 'c', heartbeat: 25, ...hello })
  }

  /** One frame of one or more lines. */
  says(...lines: Line[]): void {
    this.frame(lines.map((line) => JSON.stringify(line)).join('\n'))
  }

  frame(data: unknown): void {
    this.onmessage?.({ data })
  }

  drops(code = 1006, reason = ''): void {
    this.readyState = 3
    this.onerror?.({})
    this.onclose?.({ code, reason })
  }

  /** The commands of one kind that came on it. */
  commands<T extends Command['type']>(type: T): Extract<Command, { type: T }>[] {
    return this.sent.filter((command) => command.type === type) as Extract<Command, { type: T }>[]
  }

  /** The last command of a kind. */
  last<T extends Command['type']>(type: T): Extract<Command, { type: T }> {
    const command = this.commands(type).at(-1)
    if (!command) throw new Error(`unable to find a ${type}; the client sent ${JSON.stringify(this.sent)}`)
    return command
  }
}

/** One request of the page, to be answered by the test. */
export class ScriptedRequest {
  readonly url: URL
  readonly init: RequestInit
  readonly response: Promise<Response>
  isAborted = false
  #respond!: (response: Response) => void
  #fail!: (error: unknown) => void
  #stream: ReadableStreamDefaultController<Uint8Array> | undefined

  constructor(url: URL, init: RequestInit) {
    this.url = url
    this.init = init
    this.response = new Promise((respond, fail) => {
      this.#respond = respond
      this.#fail = fail
    })
    init.signal?.addEventListener('abort', () => {
      this.isAborted = true
      this.fails(init.signal?.reason)
    })
  }

  get body(): Command {
    return JSON.parse(String(this.init.body))
  }

  get headers(): Headers {
    return new Headers(this.init.headers)
  }

  answers(body: object | string, status = 200): void {
    this.#respond(new Response(typeof body === 'string' ? body : JSON.stringify(body), { status }))
  }

  /** An event stream begins; or what somebody in between has made of it. */
  streams(contentType = 'text/event-stream; charset=utf-8'): void {
    const body = new ReadableStream<Uint8Array>({
      start: (controller) => {
        this.#stream = controller
      },
    })
    this.#respond(new Response(body, { headers: { 'content-type': contentType } }))
  }

  writes(text: string): void {
    this.#stream?.enqueue(new TextEncoder().encode(text))
  }

  event(data: object, name?: string): void {
    this.writes(`${name ? `event: ${name}\n` : ''}data: ${JSON.stringify(data)}\n\n`)
  }

  ends(): void {
    this.#stream?.close()
  }

  fails(error: unknown = new TypeError('Failed to fetch')): void {
    this.#fail(error)
    try {
      this.#stream?.error(error)
    } catch {
      // It was closed or cancelled before: nothing is left to fail.
    }
  }
}

export class ScriptedNetwork {
  readonly sockets: ScriptedSocket[] = []
  readonly requests: ScriptedRequest[] = []
  readonly WebSocket: typeof WebSocket
  readonly fetch: typeof fetch

  constructor() {
    const { sockets, requests } = this
    this.WebSocket = class extends ScriptedSocket {
      constructor(url: string | URL, protocols?: string | string[]) {
        super(url, protocols)
        sockets.push(this)
      }
    } as unknown as typeof WebSocket
    this.fetch = async (url, init = {}) => {
      const request = new ScriptedRequest(new URL(String(url)), init)
      requests.push(request)
      return request.response
    }
  }

  /** The newest socket. */
  get socket(): ScriptedSocket {
    const socket = this.sockets.at(-1)
    if (!socket) throw new Error('unable to find a socket; the client has opened none')
    return socket
  }

  /** Requests whose path ends so, and whose answer is still wanted. */
  open(path: string): ScriptedRequest[] {
    return this.requests.filter(({ url, isAborted }) => url.pathname.endsWith(path) && !isAborted)
  }

  /** The newest such request. */
  request(path: string): ScriptedRequest {
    const request = this.open(path).at(-1)
    if (!request) {
      const seen = this.requests.map(({ url }) => url.pathname)
      throw new Error(`unable to find a request of ${path}; there were ${JSON.stringify(seen)}`)
    }
    return request
  }
}
