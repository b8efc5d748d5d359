// Counts what one device is told, offset by offset, so that nobody has to believe that nothing is missing or twice.

export class Proof {
  records = 0
  first = 0
  last = 0
  gaps = 0
  duplicates = 0

  take({ offset }) {
    if (this.last && offset <= this.last) {
      this.duplicates += 1
      return
    }
    if (this.last) this.gaps += offset - this.last - 1
    this.first ||= offset
    this.last = offset
    this.records += 1
  }

  get isBroken() {
    return this.gaps + this.duplicates > 0
  }

  toString() {
    if (!this.records) return 'nothing read yet'
    const since = this.first > 1 ? ` (from ${this.first})` : ''
    return `offset ${this.last}${since} · ${count(this.gaps, 'gap')} · ${count(this.duplicates, 'duplicate')}`
  }
}

function count(number, noun) {
  return `${number || 'no'} ${noun}${number === 1 ? '' : 's'}`
}
