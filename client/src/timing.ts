/** Every wait of the client, in milliseconds unless it says otherwise. Each has a default; tests shrink them. */
export interface Timing {
  /** A carrier that shows no sign of the gateway for so long is given up for the next one. */
  readonly helloMs: number
  /** The longest wait before the first new attempt; doubled by each that fails, and drawn from [0, longest). */
  readonly backoffBaseMs: number
  readonly backoffMaxMs: number
  /** Of failed attempts, before streams fail and sends are refused. `Infinity`: never. */
  readonly giveUpMs: number
  /** How long a connection has to answer when the page wakes up. */
  readonly probeMs: number
  /** After falling back: when a better carrier is tried again. Doubled by each that fails, up to ten times. */
  readonly reprobeMs: number
  /** The same when that carrier had worked in this page: then it was most likely the network that was gone. */
  readonly reprobeSoonMs: number
  /** How long one long-poll waits for a record, in **seconds**; 30 is the most. */
  readonly pollSeconds: number
  /** Over and above its own wait, what an HTTP request may take. */
  readonly requestMs: number
  /** A connection that nothing is attached to is closed after so long. */
  readonly idleMs: number
  /** How long a command that was refused as retryable is repeated; by a node that stops, for `giveUpMs`. */
  readonly retryMs: number
}

export const DEFAULT_TIMING: Timing = {
  // The issue's own figure: long enough for a bad mobile network, short enough to wait for once.
  helloMs: 4_000,
  backoffBaseMs: 500,
  backoffMaxMs: 10_000,
  giveUpMs: 300_000,
  probeMs: 3_000,
  reprobeMs: 60_000,
  reprobeSoonMs: 5_000,
  // Below the shortest idle limit on the way: 60 s at AWS ALB and nginx.
  pollSeconds: 25,
  requestMs: 15_000,
  idleMs: 60_000,
  retryMs: 30_000,
}
