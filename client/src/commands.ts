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
}

export class Commands {
  readonly #waiting = new Map<string, Waiting>()
  readonly #give: (command: SendCommand | CancelCommand) => boolean
  readonly #retryMs: number

  /** @param give - Hands a command to the carrier; false: there is none now. */
  constructor(give: (command: SendCommand | CancelCommand) => boolean, retryMs: number) {
    this.#give = give
    this.#retryMs = retryMs
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
    for (const waiting of this.#waiting.values()) waiting.isGiven = false
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
    const isTimeLeft = performance.now() + wait - waiting.askedAt < this.#retryMs
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
