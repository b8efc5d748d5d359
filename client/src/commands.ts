/**
 * Commands that wait for their reply, whatever happens to the connection meanwhile.
 *
 * A send names its turn and a cancel is idempotent, so both are given again on each new connection until they are
 * answered: cancels before sends, and a send not before the cancel of everything that was asked for earlier.
 */
import { RefusedError } from './errors.js'
import {
  type Accepted,
  type CancelCommand,
  type Cancelled,
  type CancelledTurn,
  mintId,
  type Refused,
  type SendCommand,
} from './protocol.js'
import type { Timing } from './timing.js'

/** Refusals that pass by themselves; what else is retryable, is so for a person. */
const PASSING = new Set(['store-unavailable', 'draining', 'rate-limited'])

interface Waiting {
  readonly command: SendCommand | CancelCommand
  readonly resolve: (reply: Accepted | readonly CancelledTurn[]) => void
  readonly reject: (error: Error) => void
  readonly askedAt: number
  /** Given on this connection, and not answered. */
  isGiven: boolean
  retry: ReturnType<typeof setTimeout> | undefined
  /** The refusal is of this node alone: another one is asked at once. */
  isElsewhere?: boolean
}

export class Commands {
  readonly #waiting = new Map<string, Waiting>()
  readonly #give: (command: SendCommand | CancelCommand) => boolean
  readonly #timing: Pick<Timing, 'giveUpMs' | 'retryMs'>

  /** @param give - Hands a command to the carrier; false: there is none now. */
  constructor(
    give: (command: SendCommand | CancelCommand) => boolean,
    timing: Pick<Timing, 'giveUpMs' | 'retryMs'>,
  ) {
    this.#give = give
    this.#timing = timing
  }

  get isEmpty(): boolean {
    return this.#waiting.size === 0
  }

  send(command: Omit<SendCommand, 'type' | 'id'>): Promise<Accepted> {
    return this.#ask({ type: 'send', id: mintId(), ...command }) as Promise<Accepted>
  }

  async cancel(session: string, turn?: string): Promise<readonly CancelledTurn[]> {
    const command: CancelCommand = {
      type: 'cancel',
      id: mintId(),
      session,
      ...(turn !== undefined && { turn }),
    }
    return this.#ask(command) as Promise<readonly CancelledTurn[]>
  }

  /** Turns of a session whose send was not answered yet. */
  unanswered(session: string): string[] {
    return [...this.#waiting.values()].flatMap(({ command }) =>
      command.type === 'send' && command.session === session ? [command.turn] : [],
    )
  }

  /** There is a carrier. */
  giveAll(): void {
    for (const waiting of this.#inOrder()) this.#giveIfDue(waiting)
  }

  /** The carrier is gone, and with it the replies. */
  disconnected(): void {
    for (const waiting of this.#waiting.values()) {
      waiting.isGiven = false
      if (!waiting.isElsewhere) continue
      clearTimeout(waiting.retry)
      waiting.retry = undefined
    }
  }

  /** A reply came; perhaps to something else. */
  answered(reply: Accepted | Cancelled | Refused): void {
    const waiting = this.#waiting.get(reply.id ?? '')
    if (!waiting) return
    if (reply.type === 'error') return this.#refused(waiting, reply)
    this.#drop(waiting)
    waiting.resolve(reply.type === 'accepted' ? reply : reply.turns)
    this.giveAll() // a send may have waited for a cancel
  }

  /** A `turn-start` is as good as the `accepted` that a cut has swallowed. */
  began(session: string, turn: string, cursor: string): void {
    for (const waiting of this.#waiting.values()) {
      const { command } = waiting
      if (command.type !== 'send' || command.session !== session || command.turn !== turn) continue
      this.#drop(waiting)
      waiting.resolve({ type: 'accepted', id: command.id, session, turn, cursor })
    }
  }

  fail(error: Error): void {
    for (const waiting of [...this.#waiting.values()]) {
      this.#drop(waiting)
      waiting.reject(error)
    }
  }

  #ask(command: SendCommand | CancelCommand): Promise<Accepted | readonly CancelledTurn[]> {
    return new Promise((resolve, reject) => {
      const waiting: Waiting = {
        command,
        resolve,
        reject,
        askedAt: performance.now(),
        isGiven: false,
        retry: undefined,
      }
      this.#waiting.set(command.id, waiting)
      this.#giveIfDue(waiting)
    })
  }

  #inOrder(): Waiting[] {
    const all = [...this.#waiting.values()]
    return [
      ...all.filter(({ command }) => command.type === 'cancel'),
      ...all.filter(({ command }) => command.type === 'send'),
    ]
  }

  #giveIfDue(waiting: Waiting): void {
    if (waiting.isGiven || waiting.retry !== undefined) return
    if (waiting.command.type === 'send' && this.#isHeldBack(waiting.command)) return
    waiting.isGiven = this.#give(waiting.command)
  }

  /** A cancel of all that runs, asked for before this send, must not meet it: two requests may overtake each other. */
  #isHeldBack(send: SendCommand): boolean {
    for (const { command } of this.#waiting.values()) {
      if (command.id === send.id) return false
      if (command.type === 'cancel' && command.session === send.session && command.turn === undefined)
        return true
    }
    return false
  }

  #refused(waiting: Waiting, refused: Refused): void {
    // Jittered, since what one client is refused, all are.
    const wait = (refused.retryAfter ?? 1) * 1_000 * (0.5 + Math.random() / 2)
    // A node that stops refuses until its last turn has ended, and is another one then.
    waiting.isElsewhere = refused.code === 'draining'
    const patience = this.#timing[waiting.isElsewhere ? 'giveUpMs' : 'retryMs']
    const isTimeLeft = performance.now() + wait - waiting.askedAt < patience
    if (PASSING.has(refused.code) && refused.retryable && isTimeLeft) {
      waiting.isGiven = false
      waiting.retry = setTimeout(() => {
        waiting.retry = undefined
        this.#giveIfDue(waiting)
      }, wait)
    } else {
      this.#drop(waiting)
      waiting.reject(new RefusedError(refused))
      this.giveAll()
    }
  }

  #drop(waiting: Waiting): void {
    clearTimeout(waiting.retry)
    this.#waiting.delete(waiting.command.id)
  }
}
