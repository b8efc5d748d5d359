/**
 * The browser's half of Session Gateway.
 *
 * @packageDocumentation
 */
export {
  type AttachOptions,
  type ConnectionPhase,
  type ConnectionStatus,
  GatewayConnection,
  type SendRequest,
} from './connection.js'
export type { GatewayConnectionOptions } from './endpoint.js'
export { ClosedError, RefusedError, type TurnEnd, TurnError } from './errors.js'
export type { SessionListener } from './feed.js'
export { type ObservableChat, observe } from './observe.js'
export {
  type Accepted,
  type Attached,
  type By,
  type CancelledTurn,
  type CancelResult,
  type CarrierName,
  type Chunk,
  type EndReason,
  type Failure,
  mintId,
  type Overlap,
  type ResyncReason,
  type SessionRecord,
  type TurnEndRecord,
  type TurnStart,
  type TurnStatus,
} from './protocol.js'
export type { PreparedRequest, PrepareOptions, PrepareSendMessagesRequest, Resolvable } from './request.js'
export { DEFAULT_TIMING, type Timing } from './timing.js'
export { GatewayChatTransport, type GatewayChatTransportOptions } from './transport.js'
