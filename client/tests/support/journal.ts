/** A gateway as small as it can be: one session's records, and the places of the clients that read them. */
import type {
  Attached,
  Chunk,
  ResyncReason,
  SessionRecord,
  TurnEndRecord,
  TurnStart,
} from '../../src/protocol.js'

export interface AskedPlace {
  readonly after?: string
  readonly from?: 'start' | 'running'
}

interface Told {
  readonly attached: Omit<Attached, 'id'>
  /** The offset that pushes follow from. */
  readonly offset: number
}

export class Journal {
  readonly session: string
  epoch = 1
  /** What was dropped from its beginning. */
  trimmed = 0
  records: SessionRecord[] = []

  constructor(session = 's') {
    this.session = session
  }

  get last(): number {
    return this.trimmed + this.records.length
  }

  /** Of what nobody has written to there is none. */
  cursor(offset: number): string {
    return this.last ? `${this.epoch}.${offset}` : ''
  }

  start(turn: string): TurnStart {
    return this.#append({ type: 'turn-start', turn, path: '/api/chat', messages: [], by: {}, at: 0 })
  }

  chunk(turn: string, data: unknown = { type: 'text-delta', id: 't', delta: `${this.last + 1}` }): Chunk {
    return this.#append({ type: 'chunk', turn, data })
  }

  end(turn: string, end: Partial<TurnEndRecord> = {}): TurnEndRecord {
    return this.#append({ type: 'turn-end', turn, reason: 'complete', ...end })
  }

  trim(count: number): void {
    this.trimmed += this.records.splice(0, count).length
  }

  /** All is lost, and another journal begins. */
  forget(): void {
    this.epoch += 1
    this.trimmed = 0
    this.records = []
  }

  at(offset: number): SessionRecord | undefined {
    return this.records[offset - this.trimmed - 1]
  }

  /** Why a cursor cannot be continued from. */
  gone(cursor: string): ResyncReason | undefined {
    const [epoch, offset] = cursor.split('.').map(Number)
    if (epoch !== this.epoch) return 'epoch-changed'
    return (offset ?? 0) < this.trimmed ? 'trimmed' : undefined
  }

  /** docs/protocol.md, `attach`. */
  attach({ after, from }: AskedPlace): Told {
    const resync = after === undefined ? undefined : this.gone(after)
    let offset = this.trimmed
    if (after !== undefined && !resync) offset = Number(after.split('.')[1])
    else if (from === 'running') offset = this.#beforeRunning()
    const cursor = this.cursor(offset)
    const turns = this.#running().map((turn) => ({ turn: turn.turn, state: 'running', offset: turn.offset }))
    const attached = {
      type: 'attached',
      session: this.session,
      cursor,
      offset,
      last: this.last,
      turns,
    } as const
    return { attached: resync ? { ...attached, resync } : attached, offset }
  }

  #running(): TurnStart[] {
    const ended = new Set(this.records.filter(({ type }) => type === 'turn-end').map(({ turn }) => turn))
    return this.records.filter((one): one is TurnStart => one.type === 'turn-start' && !ended.has(one.turn))
  }

  #beforeRunning(): number {
    const [oldest] = this.#running()
    return oldest ? oldest.offset - 1 : this.last
  }

  #append<R extends SessionRecord>(record: Omit<R, 'session' | 'offset' | 'cursor'>): R {
    const offset = this.last + 1
    const cursor = `${this.epoch}.${offset}`
    const whole = { ...record, session: this.session, offset, cursor } as unknown as R
    this.records.push(whole)
    return whole
  }
}
