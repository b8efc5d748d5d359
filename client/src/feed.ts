/**
 * One session, as this client reads it: who listens, and where they are.
 *
 * Several may listen to one session, each from its own place. The gateway pushes from one place per client; it is moved
 * back when somebody new needs earlier records, and who had them does not get them again.
 *
 * Rule 1: a listener gets each offset once, in order, without a gap, between two resets.
 * Rule 2: the place is never moved past what somebody has not had.
 */
import { tell } from './errors.js'
import type { Attached, From, ResyncReason, SessionRecord } from './protocol.js'

/** What a listener is told. None of it is awaited; all of it comes in order. */
export interface SessionListener {
  /** Its place is known: records follow from `attached.offset`. Again after a reset, and not after a mere reconnect. */
  attached?(attached: Attached): void
  /** @param size - About its bytes. */
  record(record: SessionRecord, size: number): void
  /** All that was journalled when it attached (or was reset) has been told; what follows is live. */
  caughtUp?(): void
  /** What it had so far is not in the journal any more; it is told from the first record kept. */
  reset?(reason: ResyncReason): void
  /** It gets nothing more. */
  failed?(error: Error): void
}

/** Where somebody begins: at a place, or with the `turn-start` of a turn that is being sent. */
export type Begin = { from: From } | { after: string } | { turn: string }

class Listening {
  readonly listener: SessionListener
  /** Whether it bears any outage; others fail when reconnecting is given up. */
  readonly isPatient: boolean
  begin: Begin
  /** The last record had; undefined: it is not placed yet. */
  offset: number | undefined
  isCatchingUp = true

  constructor(listener: SessionListener, begin: Begin, isPatient: boolean) {
    this.listener = listener
    this.begin = begin
    this.isPatient = isPatient
  }
}

export interface Place {
  readonly after?: string
  readonly from?: From
}

export class SessionFeed {
  readonly session: string
  /** Of the last record told by the gateway; what a reconnect continues from. */
  cursor: string | undefined
  offset = 0
  /** The newest offset known. */
  last = 0
  /** The id of the attach that is under way; replies to earlier ones are old news. */
  attaching: string | undefined
  /** When an attach that was refused for now is asked again. */
  retry: ReturnType<typeof setTimeout> | undefined
  /** Whether this connection pushes the session's records. */
  isAttached = false
  #listeners: Listening[] = []
  /** The place that was moved past, until it is taken up again. */
  #back: { readonly cursor: string | undefined; readonly offset: number } | undefined
  /** Whether `offset` is that of the place; the reply to a send tells a cursor only. */
  #isPlaced = false

  constructor(session: string) {
    this.session = session
  }

  get isEmpty(): boolean {
    return this.#listeners.length === 0
  }

  /** Whether nothing is known that has not been told. */
  get isCaughtUp(): boolean {
    if (this.attaching !== undefined) return false
    return this.isAttached ? this.offset >= this.last : this.wanted() === undefined
  }

  add(listener: SessionListener, begin: Begin, isPatient: boolean): void {
    this.#listeners.push(new Listening(listener, begin, isPatient))
  }

  remove(listener: SessionListener): void {
    this.#listeners = this.#listeners.filter((listening) => listening.listener !== listener)
  }

  /** Where to attach now, if anywhere: after a reconnect for all who have a place, then for who waits for one. */
  wanted(): Place | undefined {
    // Only a cursor can be answered that it is gone; where somebody else begins tells nothing about it.
    if (!this.isAttached && this.cursor !== undefined) return { after: this.cursor }
    // A place has no cursor where nobody had written yet; from the start nobody gets again what they had.
    if (!this.isAttached && this.#isPlaced) return {}
    const waiting = this.#listeners.filter(({ offset, begin }) => offset === undefined && !('turn' in begin))
    const froms = waiting.map(({ begin }) => ('from' in begin ? begin.from : undefined))
    if (froms.includes('start')) return {}
    if (froms.includes('running')) return { from: 'running' }
    const after = waiting.map(({ begin }) => ('after' in begin ? begin.after : undefined)).find((one) => one)
    return after === undefined ? undefined : { after }
  }

  /**
   * An attach was answered.
   *
   * @returns Where to attach again, if the place moved past what somebody has not had.
   */
  attached(attached: Attached, place: Place): Place | undefined {
    const isMoved =
      !this.#goBack() && (this.isAttached || (this.cursor !== undefined && place.after !== this.cursor))
    const before = { cursor: this.cursor, offset: this.offset }
    // Only a cursor can be answered that it is gone; where there was none yet it is seen by the offset.
    const isGone = !isMoved && this.#isPlaced && this.cursor === undefined && this.#isMissed(attached.offset)
    const resync = attached.resync ?? (isGone && attached.offset > this.offset ? 'trimmed' : undefined)
    this.attaching = undefined
    this.isAttached = true
    if (resync) this.#reset(resync, place.after)
    this.cursor = attached.cursor || undefined
    this.offset = attached.offset
    this.#isPlaced = true
    this.last = attached.last
    for (const listening of this.#listeners) this.#place(listening, attached, place)
    this.#tellCaughtUp()
    const isPast = isMoved && !resync && attached.offset > before.offset && this.#isMissed(attached.offset)
    this.#back = isPast ? before : undefined
    if (!isPast) return undefined
    return before.cursor === undefined ? {} : { after: before.cursor }
  }

  /** A send was accepted, and the gateway attached its sender by it. */
  follow(cursor: string): void {
    this.cursor = cursor
    this.isAttached = true
    this.#isPlaced = false
  }

  /** A send of old was accepted again: its turn may have begun before the place, or be gone, which an attach there tells. */
  begin(turn: string, cursor: string): void {
    for (const listening of this.#listeners) {
      const { begin, offset } = listening
      const isOwn = 'turn' in begin && begin.turn === turn && offset === undefined
      if (isOwn) listening.begin = { after: cursor }
    }
  }

  /** @returns False: it is not the next one, and nobody was told; attach again after the cursor. */
  record(record: SessionRecord, size: number): boolean {
    if (this.#isPlaced && record.offset > this.offset + 1) return false
    this.#isPlaced = true
    this.cursor = record.cursor
    this.offset = record.offset
    if (record.offset > this.last) this.last = record.offset
    for (const listening of [...this.#listeners]) {
      if (!this.#listeners.includes(listening)) continue // it left by what another was told
      const { begin } = listening
      const isOwn = 'turn' in begin && record.type === 'turn-start' && begin.turn === record.turn
      if (isOwn && listening.offset === undefined) listening.offset = record.offset - 1
      if (listening.offset !== record.offset - 1) continue
      listening.offset = record.offset
      tell(() => listening.listener.record(record, size))
    }
    this.#tellCaughtUp()
    return true
  }

  /** The gateway told that this place cannot be continued: nobody is attached any more. */
  lost(reason: ResyncReason): void {
    this.isAttached = false
    this.cursor = undefined
    this.offset = this.last = 0
    this.#isPlaced = false
    this.#back = undefined
    this.#reset(reason)
  }

  /** The connection is gone; the place is kept. */
  disconnected(): void {
    this.isAttached = false
    this.attaching = undefined
    this.#goBack()
  }

  /** End listeners: all, or those that do not bear an outage. */
  fail(error: Error, which: 'all' | 'impatient'): void {
    const failing = this.#listeners.filter(({ isPatient }) => which === 'all' || !isPatient)
    this.#listeners = this.#listeners.filter((listening) => !failing.includes(listening))
    for (const { listener } of failing) tell(() => listener.failed?.(error))
  }

  /** To the place that was moved past, if one was. */
  #goBack(): boolean {
    const back = this.#back
    if (!back) return false
    this.cursor = back.cursor
    this.offset = back.offset
    this.#back = undefined
    return true
  }

  #place(listening: Listening, attached: Attached, place: Place): void {
    if (listening.offset !== undefined || 'turn' in listening.begin) return
    const { begin } = listening
    const from = place.after === undefined ? (place.from ?? 'start') : attached.resync && 'start'
    const isMeant = 'after' in begin ? begin.after === place.after : begin.from === from
    if (!isMeant) return
    listening.offset = attached.offset
    listening.isCatchingUp = true
    tell(() => listening.listener.attached?.(attached))
  }

  /** @param gone - The cursor that cannot be continued. */
  #reset(reason: ResyncReason, gone?: string): void {
    for (const listening of this.#listeners) {
      const { begin, offset } = listening
      // Who waits for its own turn to begin may wait for what will not be told from here on; others wait for a place.
      const isConcerned = 'turn' in begin || ('after' in begin && begin.after === gone)
      if (offset === undefined && !isConcerned) continue
      listening.offset = undefined
      listening.isCatchingUp = true
      listening.begin = { from: 'start' }
      tell(() => listening.listener.reset?.(reason))
    }
  }

  #tellCaughtUp(): void {
    if (this.offset < this.last) return
    for (const listening of [...this.#listeners]) {
      if (!listening.isCatchingUp || listening.offset === undefined || listening.offset < this.last) continue
      listening.isCatchingUp = false
      tell(() => listening.listener.caughtUp?.())
    }
  }

  /** Whether somebody has not had all that stands before this place; a turn of one's own may have begun there. */
  #isMissed(place: number): boolean {
    const isWaiting = this.#listeners.some(({ offset, begin }) => offset === undefined && 'turn' in begin)
    return isWaiting || this.#isAnyBefore(place)
  }

  #isAnyBefore(place: number): boolean {
    return this.#listeners.some(({ offset }) => offset !== undefined && offset < place)
  }
}
