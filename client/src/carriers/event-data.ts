/** An event longer than this is none of the gateway's: GATEWAY_MAX_EVENT is 1 MiB by default, and a record holds one. */
const MAX_LENGTH = 32 * 1024 * 1024

/**
 * The `data` of Server-Sent Events, from text that was cut anywhere.
 *
 * Of https://html.spec.whatwg.org/#event-stream-interpretation what this wire needs: lines end in LF or CRLF, and all
 * other fields are left out, since each of the gateway's events says in its data what it is.
 */
export class EventData {
  #rest = ''
  #data: string[] = []
  #length = 0

  /**
   * Take text; return the data of the events that it completed.
   *
   * @throws RangeError - An event is too long.
   */
  feed(text: string): string[] {
    this.#rest += text
    this.#length += text.length
    if (this.#length > MAX_LENGTH) throw new RangeError('unable to read an event; it is too long')
    // Joining is cheap, and splitting is not: a long line comes in many pieces.
    if (!text.includes('\n')) return []
    const lines = this.#rest.split('\n')
    this.#rest = lines.pop() as string
    const events: string[] = []
    for (const line of lines.map((line) => line.replace(/\r$/, ''))) {
      if (/^data(:|$)/.test(line)) this.#data.push(line.slice(line[5] === ' ' ? 6 : 5))
      if (line || !this.#data.length) continue
      events.push(this.#data.join('\n'))
      this.#data = []
      this.#length = this.#rest.length
    }
    return events
  }
}
