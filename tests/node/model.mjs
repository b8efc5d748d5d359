// What a scenario's model says, part by part, in the dialect of each major (V2 = ai 5, V3 = ai 6, V4 = ai 7).

const UNICODE_DELTAS = [
  'Zürich ', '\ud83d', '\ude00', ' \u2028\u2029 ', '\r\n\n', 'data: no event\n\n', '\u0000\u001f', 'e\u0301 ',
  '👩\u200d', '👩\u200d👧', ' \u202eRTL\u202c ', '</script>', '\\"\\', '\ufeff', '漢字',
]

/** The usage and finish part in the shape that the major's specification asks for. */
function finishPart(major, reason) {
  if (major === 5) {
    return { type: 'finish', finishReason: reason, usage: { inputTokens: 3, outputTokens: 10, totalTokens: 13 } }
  }
  return {
    type: 'finish',
    finishReason: { unified: reason, raw: reason },
    usage: {
      inputTokens: { total: 3, noCache: 3, cacheRead: 0, cacheWrite: 0 },
      outputTokens: { total: 10, text: 10, reasoning: 0 },
    },
  }
}

function* spoken(kind, id, deltas) {
  yield { type: `${kind}-start`, id }
  for (const delta of deltas) yield { type: `${kind}-delta`, id, delta }
  yield { type: `${kind}-end`, id }
}

function* toolCalled(toolName, toolCallId, input) {
  const json = JSON.stringify(input)
  yield { type: 'tool-input-start', id: toolCallId, toolName }
  for (let at = 0; at < json.length; at += 8) {
    yield { type: 'tool-input-delta', id: toolCallId, delta: json.slice(at, at + 8) }
  }
  yield { type: 'tool-input-end', id: toolCallId }
  yield { type: 'tool-call', toolCallId, toolName, input: json }
}

const TOOL_OF_KIND = { tool: 'weather', clienttool: 'askUser', approval: 'deleteFile' }

/** The words of a scenario; `size` pads each to that many characters. */
export function textDeltas({ kind, chunks, size = 0, word = 'tok' }) {
  if (kind === 'unicode') return UNICODE_DELTAS
  return Array.from({ length: chunks }, (_, index) => `${word}${index} `.padEnd(size, '.'))
}

/** The parts of one step. A prompt that ends with a tool's result is answered with text. */
export function* modelParts(major, scenario, prompt, callId) {
  yield { type: 'stream-start', warnings: [] }
  const toolName = TOOL_OF_KIND[scenario.kind]
  if (toolName && prompt.at(-1)?.role !== 'tool') {
    yield* spoken('text', 't1', ['before '])
    yield* toolCalled(toolName, callId, { city: 'Zürich "x" 😀', path: '/tmp/a' })
    yield finishPart(major, 'tool-calls')
    return
  }
  if (scenario.kind === 'reasoning') yield* spoken('reasoning', 'r1', textDeltas({ ...scenario, word: 'think' }))
  yield* spoken('text', 't1', textDeltas(scenario))
  if (scenario.kind === 'errorpart') yield { type: 'error', error: new Error('the provider said no') }
  yield finishPart(major, scenario.kind === 'errorpart' ? 'error' : 'stop')
}

/**
 * A model that speaks when it is read, as a provider's HTTP body would, and when its turn lets it pass.
 * Each part handed out is reported; `index` counts all parts of the turn, `delta` those a gate may hold.
 */
export function createModel({ major, MockLanguageModel, turn }) {
  const doStream = async ({ prompt, abortSignal }) => {
    turn.steps += 1
    abortSignal?.addEventListener('abort', () => turn.report('abort'), { once: true })
    if (turn.scenario.kind === 'errorbefore') throw new Error('the model is broken')
    const parts = modelParts(major, turn.scenario, prompt, `call-${turn.number}-${turn.steps}`)
    return { stream: new ReadableStream(source(parts, turn, abortSignal), { highWaterMark: 0 }) }
  }
  return new MockLanguageModel({ doStream })
}

function source(parts, turn, abortSignal) {
  return {
    async pull(controller) {
      const { done, value } = parts.next()
      if (done) return controller.close()
      try {
        const isDelta = value.type.endsWith('-delta')
        if (isDelta) await turn.pass(abortSignal)
        abortSignal?.throwIfAborted()
        if (isDelta) turn.breakWhenDue()
        turn.report('chunk', { index: turn.parts++, type: value.type, delta: isDelta ? turn.deltas++ : undefined })
        controller.enqueue(value)
      } catch (error) {
        controller.error(error)
      }
    },
    cancel: () => turn.report('cancel'),
  }
}
