// Builds what the tests load, into dist/: the client of this repository for each major of the SDK, then the page.
import { build } from 'esbuild'

const shared = { bundle: true, format: 'esm', platform: 'browser', logLevel: 'warning' }

/** dist/gateway<major>.mjs: all of `@session-gateway/client` and its `/react`; SDK and React stay those of the page. */
function buildClient(major) {
  const contents = `export * from '../../client/src/index.ts'\nexport * from '../../client/src/react.ts'\n`
  return build({
    ...shared,
    stdin: { contents, resolveDir: import.meta.dirname, sourcefile: `gateway${major}.ts` },
    alias: { ai: `ai${major}`, '@ai-sdk/react': `react${major}` },
    external: [`ai${major}`, `react${major}`, 'react'],
    target: 'es2022',
    outfile: `dist/gateway${major}.mjs`,
  })
}

await Promise.all([5, 6, 7].map(buildClient))
await build({ ...shared, entryPoints: ['page/main.jsx'], minify: true, jsx: 'automatic', outfile: 'dist/main.js' })
