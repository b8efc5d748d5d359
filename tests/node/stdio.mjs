// One JSON object per line on stdin and stdout; everything else a library prints goes to stderr.
import { createInterface } from 'node:readline'

console.log = console.info = console.debug = console.warn = console.error

/** Writes one line. On a pipe this is synchronous, so lines keep the order of what they tell. */
export function writeLine(value) {
  process.stdout.write(`${JSON.stringify(value)}\n`)
}

/**
 * Performs commands `{"id", "do", ...}` and answers each with `{"id", "result"}` or `{"id", "error"}`.
 * Commands run beside each other: a `wait` holds up nothing.
 */
export function serveCommands(commands, cleanUp = async () => {}) {
  const perform = async line => {
    const { id, do: name, ...facts } = JSON.parse(line)
    try {
      const known = Object.keys(commands)
      if (!known.includes(name)) throw new Error(`unable to do ${name}; the commands are ${known}`)
      writeLine({ id, result: (await commands[name](facts)) ?? null })
    } catch (error) {
      writeLine({ id, error: String(error?.stack ?? error) })
    }
  }
  createInterface({ input: process.stdin }).on('line', perform)
  // Whoever started this process is gone, however it went: so is this.
  process.stdin.on('end', () => cleanUp().finally(() => process.exit(0)))
}
