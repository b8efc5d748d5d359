/** The session protocol over Server-Sent Events: one stream per session, commands beside it. */
import { type AttachCommand, parseLine } from '../protocol.js'
import { Silence } from './carrier.js'
import { EventData } from './event-data.js'
import { HttpCarrier } from './http.js'

/** GATEWAY_HEARTBEAT's own default, in seconds. */
const DEFAULT_HEARTBEAT = 25

export class EventStreamCarrier extends HttpCarrier {
  readonly name = 'sse'

  protected answered(): void {
    // That POST works says nothing about streams, which are what is held back on the way.
  }

  protected async follow(attach: AttachCommand, signal: AbortSignal): Promise<void> {
    let isBegun = false
    const silence = new Silence(() => this.ended({ timedOut: !isBegun }))
    signal.addEventListener('abort', () => silence.stop())
    silence.within(this.endpoint.timing.helloMs)
    const response = await this.request(this.eventsUrl(attach), {
      headers: { accept: 'text/event-stream' },
      signal,
    })
    const isStream = response.headers.get('content-type')?.startsWith('text/event-stream')
    if (!response.ok || !response.body || !isStream) {
      await this.refused(response, attach.id)
      return silence.stop() // one session that is refused does not end the others
    }
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader()
    const events = new EventData()
    for (let read = await reader.read(); !read.done; read = await reader.read()) {
      silence.heard()
      for (const data of events.feed(read.value)) {
        if (signal.aborted) return
        const said = parseLine(data)
        if (said.type === 'attached') {
          isBegun = true
          // This carrier has no `hello`; the interval stands here.
          silence.within(2_000 * (said.heartbeat ?? DEFAULT_HEARTBEAT))
          this.proven()
        }
        this.said(said.type === 'attached' ? { ...said, id: attach.id } : said, data.length)
      }
    }
    silence.stop()
    if (!signal.aborted) this.ended({})
  }
}
