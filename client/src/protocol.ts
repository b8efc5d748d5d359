/**
 * The session protocol, version 1, as a client sees it (docs/protocol.md §3).
 *
 * Types only, and the reading of one line. Members that later versions add are ignored.
 */

/** The version that this client speaks; the gateway says its own in `hello`. */
export const PROTOCOL = 1

export const SUBPROTOCOL = 'session-gateway.v1'

/** Close codes: 4000-4499 try again, 4500-4999 final. */
export const FIRST_FINAL_CLOSE_CODE = 4500
export const LAST_CLOSE_CODE = 4999

export type CarrierName = 'websocket' | 'sse' | 'long-poll'

/** What to do with a turn that runs when another is asked for. */
export type Overlap = 'parallel' | 'reject' | 'interrupt'

/** How a turn ended. */
export type EndReason = 'complete' | 'cancelled' | 'error' | 'interrupted'

/** Why a place could not be continued; what was read so far is to be dropped. */
export type ResyncReason = 'epoch-changed' | 'trimmed' | 'too-far-behind'

/** Who did something: a client by its id, or the backend itself. */
export interface By {
  readonly client?: string
  readonly user?: string
  readonly backend?: boolean
}

/** What was wrong with a turn, or with a command. */
export interface Failure {
  readonly code: string
  readonly message: string
  /** The backend's HTTP status, where it refused. */
  readonly status?: number
  /** In seconds. */
  readonly retryAfter?: number
}

interface RecordBase {
  readonly session: string
  /** 1, 2, 3 ... without holes, per session. */
  readonly offset: number
  /** Opaque; hand it back to continue after this record. */
  readonly cursor: string
  readonly turn: string
}

export interface TurnStart extends RecordBase {
  readonly type: 'turn-start'
  readonly path: string
  readonly trigger?: string
  /** The last message of the body that was sent, or none. */
  readonly messages: readonly unknown[]
  readonly messageId?: string
  readonly by: By
  /** Milliseconds since 1970. */
  readonly at: number
}

export interface Chunk extends RecordBase {
  readonly type: 'chunk'
  /** The backend's JSON. */
  readonly data?: unknown
  /** What was no JSON. */
  readonly text?: string
  /** The event's name, if it had one. */
  readonly event?: string
}

export interface TurnEndRecord extends RecordBase {
  readonly type: 'turn-end'
  readonly reason: EndReason
  readonly by?: By
  readonly error?: Failure
}

export type SessionRecord = TurnStart | Chunk | TurnEndRecord

export interface TurnStatus {
  readonly turn: string
  /** `queued`, `running`, `cancelling`, or how it ended. */
  readonly state: string
  /** Of its `turn-start`. */
  readonly offset: number
}

export interface Attached {
  readonly type: 'attached'
  readonly id?: string
  readonly session: string
  /** Records follow from here; empty where only the offset is known. */
  readonly cursor: string
  /** Of the last record had, there. */
  readonly offset: number
  /** The newest offset, at that moment. */
  readonly last: number
  readonly turns: readonly TurnStatus[]
  readonly resync?: ResyncReason
  /** On the SSE carrier, which has no `hello`: in seconds. */
  readonly heartbeat?: number
}

export interface Accepted {
  readonly type: 'accepted'
  readonly id: string
  readonly session: string
  readonly turn: string
  /** Just before the turn's `turn-start`. */
  readonly cursor: string
  readonly duplicate?: boolean
}

/** `unknown`: no such turn yet; its send will be answered as cancelled. */
export type CancelResult = 'cancelled' | 'already-ended' | 'interrupted' | 'unknown'

export interface CancelledTurn {
  readonly turn: string
  readonly result: CancelResult
}

export interface Cancelled {
  readonly type: 'cancelled'
  readonly id: string
  readonly turns: readonly CancelledTurn[]
}

export interface Refused extends Failure {
  readonly type: 'error'
  readonly id?: string
  readonly retryable: boolean
}

/** Whatever the gateway may say. */
export type Said =
  | { readonly type: 'hello'; readonly protocol: number; readonly heartbeat: number }
  | { readonly type: 'heartbeat' }
  | { readonly type: 'ok' | 'pong'; readonly id: string }
  | { readonly type: 'resync'; readonly session: string; readonly reason: ResyncReason }
  | { readonly type: 'goaway'; readonly after: number }
  | Attached
  | Accepted
  | Cancelled
  | Refused
  | SessionRecord

/** Where an attach begins without a cursor: see docs/protocol.md, `attach`. */
export type From = 'start' | 'running'

export interface AttachCommand {
  readonly type: 'attach'
  readonly id: string
  readonly session: string
  readonly after?: string
  readonly from?: From
}

export interface DetachCommand {
  readonly type: 'detach'
  readonly id: string
  readonly session: string
}

export interface SendCommand {
  readonly type: 'send'
  readonly id: string
  readonly session: string
  readonly turn: string
  readonly body: object
  readonly path?: string
  readonly overlap?: Overlap
  readonly headers?: Readonly<Record<string, string>>
}

export interface CancelCommand {
  readonly type: 'cancel'
  readonly id: string
  readonly session: string
  readonly turn?: string
}

export interface PingCommand {
  readonly type: 'ping'
  readonly id: string
}

export type Command = AttachCommand | DetachCommand | SendCommand | CancelCommand | PingCommand

/**
 * Read one line.
 *
 * @throws SyntaxError - It is no JSON object with a `type`: not our gateway, or something in between.
 */
export function parseLine(line: string): Said {
  const said: unknown = JSON.parse(line)
  if (typeof said !== 'object' || said === null || !('type' in said) || typeof said.type !== 'string') {
    throw new SyntaxError(`unable to read ${line.slice(0, 60)}; it has no type`)
  }
  return said as Said
}

/** Whether something said is a record, which has an offset. */
export function isRecord(said: Said): said is SessionRecord {
  return said.type === 'turn-start' || said.type === 'chunk' || said.type === 'turn-end'
}

/** Whether a turn has not ended. */
export function isRunning({ state }: TurnStatus): boolean {
  return state === 'running' || state === 'queued' || state === 'cancelling'
}

/** 128 random bits. `crypto.randomUUID` would do, but a page on plain http has none. */
export function mintId(): string {
  const bytes = crypto.getRandomValues(new Uint8Array(16))
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, '0')).join('')
}
