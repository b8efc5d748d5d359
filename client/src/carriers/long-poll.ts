/** The session protocol over long-polls: what is left where even streams are held back. */
import type { AttachCommand, ResyncReason, Said, SessionRecord, TurnStatus } from '../protocol.js'
import { HttpCarrier } from './http.js'

interface Polled {
  readonly cursor: string
  readonly offset: number
  readonly last: number
  readonly turns: readonly TurnStatus[]
  readonly records: readonly SessionRecord[]
  readonly resync?: ResyncReason
}

export class LongPollCarrier extends HttpCarrier {
  readonly name = 'long-poll'

  protected answered(): void {
    this.proven()
  }

  protected async follow(attach: AttachCommand, signal: AbortSignal): Promise<void> {
    // The first one does not wait: its answer is the `attached`. Each later one continues the one before.
    for (let place = attach, wait = 0; !signal.aborted; wait = this.endpoint.timing.pollSeconds) {
      const polled = await this.#poll(place, wait, signal)
      if (!polled || signal.aborted) return
      if (wait === 0) this.#attached(attach, polled)
      else if (polled.resync)
        return this.said({ type: 'resync', session: attach.session, reason: polled.resync }, 0)
      for (const record of polled.records) {
        if (!signal.aborted) this.said(record, JSON.stringify(record).length)
      }
      place = { ...place, after: polled.cursor }
    }
  }

  /** The answer tells where it ends; an `attached` tells where it begins, of which only the offset is known. */
  #attached({ id, session }: AttachCommand, polled: Polled): void {
    const { last, turns, records, resync } = polled
    const [first] = records
    const offset = first ? first.offset - 1 : polled.offset
    const cursor = first ? '' : polled.cursor
    this.proven()
    const attached: Said = { type: 'attached', id, session, cursor, offset, last, turns }
    this.said(resync ? { ...attached, resync } : attached, 0)
  }

  #poll(place: AttachCommand, wait: number, leaving: AbortSignal): Promise<Polled | undefined> {
    return this.within(wait * 1_000 + this.endpoint.timing.requestMs, leaving, async (signal) => {
      const headers = { accept: 'application/json' }
      const response = await this.request(this.eventsUrl(place, { wait: String(wait) }), { headers, signal })
      if (response.ok) return (await response.json()) as Polled
      await this.refused(response, place.id)
      return undefined
    })
  }
}
