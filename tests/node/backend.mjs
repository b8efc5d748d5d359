// A backend as its users write it: node:http, the real `ai` package of the major in argv, a model we can hold.
//
//   node backend.mjs <5|6|7>
//
// The route is the documented one: streamText, toUIMessageStream, pipeUIMessageStreamToResponse. What its
// model does is the scenario in the last user message (or in `body.scenario`); README.md lists them.
import { createServer } from 'node:http'
import { readFile } from 'node:fs/promises'
import { z } from 'zod'
import { createModel } from './model.mjs'
import { serveCommands } from './stdio.mjs'
import { Turn, release, report, scenarioOf, turnsWith } from './turn.mjs'

const major = Number(process.argv[2])
const MOCK_MODEL = { 5: 'MockLanguageModelV2', 6: 'MockLanguageModelV3', 7: 'MockLanguageModelV4' }
globalThis.AI_SDK_LOG_WARNINGS = false
const ai = await import(`ai${major}`)
const { [MOCK_MODEL[major]]: MockLanguageModel } = await import(`ai${major}/test`)

const chatMessages = new Map()

function tools(turn) {
  const input = z.object({ city: z.string(), path: z.string() })
  const execute = async facts => {
    turn.report('tool', { input: facts })
    return { done: facts.city }
  }
  return {
    weather: { description: 'run by the server', inputSchema: input, execute },
    askUser: { description: 'answered by the client', inputSchema: input, outputSchema: z.any() },
    deleteFile: { description: 'asks first', inputSchema: input, execute, ...(major === 6 && { needsApproval: true }) },
  }
}

/** The answer's chunks, as the documentation of the major says to make them. */
async function uiStream(turn, body) {
  const { scenario } = turn
  const toolset = tools(turn)
  const result = ai.streamText({
    model: createModel({ major, MockLanguageModel, turn }),
    messages: await ai.convertToModelMessages(body.messages ?? [body.message], { tools: toolset }),
    tools: toolset,
    stopWhen: ai.stepCountIs(5),
    onError: ({ error }) => turn.report('modelerror', { message: String(error) }),
    ...(major === 7 && { toolApproval: { deleteFile: 'user-approval' } }),
    abortSignal: turn.controller.signal,
  })
  const options = {
    ...(scenario.serverMessageId && {
      originalMessages: body.messages,
      generateMessageId: () => (scenario.serverMessageId === true ? ai.generateId() : scenario.serverMessageId),
    }),
    ...(scenario.metadata && { messageMetadata: ({ part }) => ({ [part.type]: true }) }),
  }
  const isFunction = major === 7
  const stream = isFunction
    ? ai.toUIMessageStream({ stream: result.stream, tools: toolset, ...options })
    : result.toUIMessageStream(options)
  if (scenario.kind === 'data') return withData(stream)
  return scenario.kind === 'databefore' ? stream.pipeThrough(new TransformStream({ start: writeData })) : stream
}

const DATA_PARTS = [
  { type: 'data-status', data: { says: 'searching' }, transient: true },
  { type: 'data-doc', id: 'doc1', data: { version: 1 } },
  { type: 'data-doc', id: 'doc1', data: { version: 2 } },
]

/** As a backend of its own making has it: data, then a `start` without `messageId`. */
function writeData(controller) {
  for (const part of DATA_PARTS) controller.enqueue(part)
}

/** As documented; createUIMessageStream gives its `start` a `messageId`, which the data came before. */
function withData(stream) {
  return ai.createUIMessageStream({
    execute({ writer }) {
      for (const part of DATA_PARTS) writer.write(part)
      writer.merge(stream)
    },
  })
}

async function chat(request, response) {
  const body = JSON.parse(await readAll(request))
  const scenario = scenarioOf(body)
  const turn = new Turn({ id: body.id, scenario, response })
  watch(turn, response)
  turn.report('request', { body, headers: request.headers, url: request.url })
  if (Array.isArray(body.messages)) chatMessages.set(body.id, body.messages)
  await turn.untilAnswer()
  if (scenario.kind === 'refuse') {
    response.writeHead(scenario.status ?? 429, scenario.headers ?? {}).end(scenario.body ?? 'refused')
    return
  }
  await ai.pipeUIMessageStreamToResponse({
    response,
    stream: await uiStream(turn, body),
    ...(scenario.headers && { headers: scenario.headers }),
    ...(scenario.keepAliveMs && { keepAliveMs: scenario.keepAliveMs }),
    ...(scenario.consume && { consumeSseStream: ai.consumeStream }),
  })
}

function watch(turn, response) {
  response.on('finish', () => turn.report('end'))
  response.on('close', () => {
    turn.answer()
    if (!response.writableFinished) {
      turn.report('close')
      // As the documentation says for a runtime whose request has no signal of its own.
      if (turn.scenario.plumb) turn.controller.abort()
    }
    // A turn whose route ignores the disconnect runs on, and may still be released or stopped.
    if (response.writableFinished || turn.scenario.plumb) turn.forget()
  })
}

/** What a test tells the backend while it runs, by the key of a turn; each answers how many turns it reached. */
const COMMANDS = {
  release: ({ key, count }) => release(key, count ?? Infinity),
  answer: ({ key }) => turnsWith({ key }).map(turn => turn.answer()).length,
  fail: ({ key, message }) => turnsWith({ key }).map(turn => turn.fail(message ?? 'told to fail')).length,
  cut: ({ key }) => turnsWith({ key }).map(turn => turn.response.destroy()).length,
}

async function stop(id, request, response) {
  const body = await readAll(request)
  report('stop', { id, body, headers: request.headers })
  for (const turn of turnsWith({ id })) turn.controller.abort(new Error('user stop'))
  sendJson(response, 200, { success: true })
}

async function messages(id, request, response) {
  if (request.method === 'PUT') chatMessages.set(id, JSON.parse(await readAll(request)))
  sendJson(response, 200, chatMessages.get(id) ?? [])
}

const FILES = {
  '/': ['page/index.html', 'text/html; charset=utf-8'],
  '/main.js': ['dist/main.js', 'text/javascript; charset=utf-8'],
}

async function route(request, response) {
  const { pathname } = new URL(request.url, 'http://backend')
  const [, id, action] = /^\/api\/chat\/([^/]+)\/(stop|messages)$/.exec(pathname) ?? []
  if (request.method === 'POST' && pathname === '/api/chat') return chat(request, response)
  if (request.method === 'POST' && action === 'stop') return stop(decodeURIComponent(id), request, response)
  if (action === 'messages') return messages(decodeURIComponent(id), request, response)
  report('other', { method: request.method, url: request.url, headers: request.headers })
  if (!Object.hasOwn(FILES, pathname)) return sendJson(response, 404, { error: 'not found' })
  const [file, contentType] = FILES[pathname]
  response.writeHead(200, { 'content-type': contentType }).end(await readFile(new URL(file, import.meta.url)))
}

async function readAll(request) {
  const pieces = []
  for await (const piece of request) pieces.push(piece)
  return Buffer.concat(pieces).toString('utf8')
}

function sendJson(response, status, value) {
  response.writeHead(status, { 'content-type': 'application/json' }).end(JSON.stringify(value))
}

const server = createServer((request, response) => {
  route(request, response).catch(error => {
    report('routeerror', { message: String(error) })
    if (!response.headersSent) sendJson(response, 500, { error: String(error) })
    else if (!response.writableEnded) response.destroy()
  })
})
// What rejects inside the SDK with nobody listening is told, and does not end the other turns.
process.on('unhandledRejection', error => report('rejection', { message: String(error) }))
server.listen(0, '127.0.0.1', () => report('listening', { port: server.address().port, major }))
serveCommands(COMMANDS)
