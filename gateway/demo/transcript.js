// Records to elements. Text is only ever set as text: nothing a model or a person says becomes markup.

const HAND_TIME = 1000 // A scroll so soon after a wheel, a touch or a key is its reader's.

function make(tag, className, text) {
  const element = document.createElement(tag)
  if (className) element.className = className
  if (text !== undefined) element.textContent = text
  return element
}

/** One turn: the question, the parts of the answer, how it ended. */
class Turn {
  parts = new Map() // id of a part that is open -> its element; ids are unique within a step only
  tools = new Map() // toolCallId -> its elements
  chunks = 0

  constructor(turn) {
    this.element = make('article', 'turn running')
    this.element.dataset.turn = turn
    this.answer = make('div', 'answer')
    this.element.append(this.answer)
  }

  ask(messages, who) {
    for (const message of messages) {
      const texts = (message.parts ?? []).filter((part) => part.type === 'text').map((part) => part.text)
      const question = make('div', 'question')
      question.append(make('p', 'bubble', texts.join('\n')), make('small', 'who', `from ${who}`))
      this.answer.before(question)
    }
  }

  chunk(chunk, late) {
    this.chunks += 1
    const [, kind, step] = /^(text|reasoning|tool-input|tool-output)-(.+)$/.exec(chunk.type) ?? []
    if (kind === 'text' || kind === 'reasoning') this.#spoken(kind, step, chunk, late)
    else if (kind) this.#tool(step, chunk, late)
  }

  #spoken(kind, step, { id, delta }, late) {
    if (step === 'start') {
      const part = make('p', `part ${kind} open`)
      this.parts.set(id, part)
      this.answer.append(part)
    } else if (step === 'delta') {
      append(this.parts.get(id), delta, late)
    } else {
      this.parts.get(id)?.classList.remove('open')
      this.parts.delete(id)
    }
  }

  #tool(step, chunk, late) {
    if (step === 'start') this.tools.set(chunk.toolCallId, this.#card(chunk.toolName))
    const tool = this.tools.get(chunk.toolCallId)
    if (!tool) return
    if (step === 'delta') append(tool.input, chunk.inputTextDelta, late)
    if (chunk.type === 'tool-input-available') {
      tool.input.textContent = JSON.stringify(chunk.input, null, 1).replace(/\n\s*/g, ' ')
      tool.state.textContent = 'running'
    }
    if (chunk.type === 'tool-output-available') {
      tool.card.classList.remove('open')
      tool.state.textContent = 'done'
      for (const [name, value] of Object.entries(chunk.output ?? {})) {
        const text = typeof value === 'string' ? value : JSON.stringify(value)
        tool.output.append(make('dt', '', name), make('dd', '', text))
      }
    }
  }

  #card(name) {
    const card = make('div', 'part tool open')
    const head = make('div', 'tool-head')
    const state = make('span', 'tool-state', 'writing its input')
    const input = make('code', 'tool-input')
    const output = make('dl', 'tool-output')
    head.append(make('span', 'tool-name', name), state)
    card.append(head, input, output)
    this.answer.append(card)
    return { card, state, input, output }
  }

  end({ reason, by, error }, nameOf) {
    this.element.classList.remove('running')
    this.element.classList.add(reason)
    for (const open of this.answer.querySelectorAll('.open')) open.classList.remove('open')
    for (const { state } of this.tools.values()) if (state.textContent !== 'done') state.textContent = 'not finished'
    const told = {
      complete: () => `complete · ${this.chunks} chunks`,
      cancelled: () => `stopped by ${nameOf(by)} · ${this.chunks} chunks`,
      error: () => `error: ${error?.message || error?.code || 'not told which'}`,
      interrupted: () => `interrupted: ${error?.message || 'the gateway node that ran it is gone'}`,
    }[reason]?.()
    const ending = make('p', 'ending', told ?? reason)
    this.element.append(ending)
    return ending.textContent
  }
}

/** Add text where the last text is; what was caught up with goes into a span that lights up once. */
function append(part, text, late) {
  if (!part || !text) return
  const last = part.lastChild
  if (late && last?.className !== 'late') part.append(make('span', 'late', text))
  else if (late) last.firstChild.appendData(text)
  else if (last?.nodeType === Node.TEXT_NODE) last.appendData(text)
  else part.append(text)
}

/** The scrolling list of a pane's turns. Follows the end, unless its reader has scrolled up. */
export class Transcript {
  turns = new Map()

  constructor(scroller, nameOf) {
    this.scroller = scroller
    this.list = scroller.querySelector('.turns')
    this.nameOf = nameOf
    this.follows = true
    // A scroll event alone does not say whose doing it was: batches and resized windows cause them too.
    let handled = -Infinity
    for (const type of ['wheel', 'touchmove', 'pointerdown', 'keydown']) {
      scroller.addEventListener(type, (event) => (handled = event.timeStamp), { passive: true })
    }
    scroller.addEventListener('scroll', ({ timeStamp }) => {
      const isAtEnd = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 40
      if (isAtEnd) this.follows = true
      else if (timeStamp - handled < HAND_TIME) this.follows = false
    })
    const sizes = new ResizeObserver(() => this.#follow())
    sizes.observe(this.list)
    sizes.observe(scroller)
  }

  reset() {
    this.turns.clear()
    this.list.replaceChildren()
    this.follows = true
  }

  /** Show one record. Returns a sentence when it is worth telling to somebody who cannot see it. */
  add(record, late) {
    const turn = this.#turn(record.turn)
    switch (record.type) {
      case 'turn-start':
        turn.ask(record.messages, this.nameOf(record.by))
        this.follows = true
        return `question from ${this.nameOf(record.by)}`
      case 'chunk':
        if (record.data?.type) turn.chunk(record.data, late)
        return ''
      default:
        return turn.end(record, this.nameOf)
    }
  }

  #turn(id) {
    let turn = this.turns.get(id)
    if (!turn) {
      turn = new Turn(id)
      this.turns.set(id, turn)
      this.list.append(turn.element)
    }
    return turn
  }

  #follow() {
    if (this.follows && this.turns.size) this.scroller.scrollTop = this.scroller.scrollHeight
  }
}
