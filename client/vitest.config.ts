import { defineConfig } from 'vitest/config'

export default defineConfig({
  test: {
    include: ['tests/**/*.test.ts'],
    // The type tests against `ai` 7, by name; `npm run check` has them against 5 and 6 as well.
    typecheck: { enabled: true, include: ['tests/**/*.test-d.ts'], tsconfig: './tsconfig.json' },
    unstubGlobals: true,
    restoreMocks: true,
  },
})
