/** A real GatewayConnection on a scripted socket, with a small gateway behind it that acts when the test says so. */
import { GatewayConnection } from '../../src/connection.js'
import type { Attached, ResyncReason, Said } from '../../src/protocol.js'
import { type AskedPlace, Journal } from './journal.js'
import { ScriptedNetwork } from './network.js'

export class Rig {
  readonly network = new ScriptedNetwork()
  readonly journal = new Journal()
  readonly connection: GatewayConnection
  /** Turns that were ever sent here: a turn is begun once. */
  readonly turns = new Set<string>()
  readonly asked = new Map<string, AskedPlace>()
  /** What is on its way to the client. */
  #due: Said[] = []
  #commandsDone = 0
  /** The offset that the attached client was pushed last. */
  #place: number | undefined

  constructor() {
    const { WebSocket, fetch } = this.network
    this.connection = new GatewayConnection({
      url: 'http://gateway/',
      carriers: ['websocket'],
      WebSocket,
      fetch,
    })
  }

  /** The gateway takes one command. */
  take(): boolean {
    const command = this.network.socket.sent[this.#commandsDone]
    if (!command) return false
    this.#commandsDone += 1
    const { id } = command
    if (command.type === 'attach') {
      this.asked.set(id, command)
      this.#due.push({ ...this.#attach(command), id })
    } else if (command.type === 'detach') {
      this.#place = undefined
      this.#due.push({ type: 'ok', id })
    } else if (command.type === 'send') this.#send(id, command.turn)
    return true
  }

  /** The gateway pushes the next record. */
  push(): boolean {
    const record = this.#place === undefined ? undefined : this.journal.at(this.#place + 1)
    if (!record) return false
    this.#place = record.offset
    this.#due.push(record)
    return true
  }

  /** The network brings so many lines, in one frame. */
  deliver(lines = 1): boolean {
    const due = this.#due.splice(0, lines)
    if (due.length) this.network.socket.says(...due)
    return due.length > 0
  }

  /** The connection is lost, with what was under way, and made again. */
  cut(): void {
    this.network.socket.drops()
    this.#due = []
    this.#commandsDone = 0
    this.#place = undefined
    this.connection.reconnect()
    this.network.socket.greets()
  }

  resync(reason: ResyncReason): void {
    if (this.#place === undefined) return
    this.#place = undefined
    this.#due.push({ type: 'resync', session: this.journal.session, reason })
  }

  trim(count: number): void {
    this.journal.trim(count)
    if (this.#place !== undefined && this.#place < this.journal.trimmed) this.resync('trimmed')
  }

  forget(): void {
    this.journal.forget()
    this.resync('epoch-changed')
  }

  /** Until there is nothing left to do. */
  settle(): void {
    for (let steps = 0; this.take() || this.push() || this.deliver(); steps += 1) {
      if (steps > 5_000) throw new Error('unable to come to rest; the client goes on asking')
    }
  }

  #attach(place: AskedPlace): Attached {
    const { attached, offset } = this.journal.attach(place)
    this.#place = offset
    return attached
  }

  /** docs/protocol.md, `send`: begun once, and its sender is attached if it was not. */
  #send(id: string, turn: string): void {
    const { session } = this.journal
    const isDuplicate = this.turns.has(turn)
    this.turns.add(turn)
    const start = isDuplicate
      ? this.journal.records.find((record) => record.type === 'turn-start' && record.turn === turn)
      : this.journal.start(turn)
    const cursor = start ? this.journal.cursor(start.offset - 1) : 'gone'
    this.#due.push({ type: 'accepted', id, session, turn, cursor, ...(isDuplicate && { duplicate: true }) })
    if (this.#place !== undefined) return
    if (start) this.#place = start.offset - 1
    else this.#due.push({ type: 'resync', session, reason: 'trimmed' })
  }
}
