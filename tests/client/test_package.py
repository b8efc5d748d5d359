"""The npm package as its users get it: the packed tarball, in an app that knows nothing of this repository.

``make client`` has built what is looked at here.
"""

from __future__ import annotations

import gzip
import json
import re
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from tests.support.node_program import node_binary

if TYPE_CHECKING:
    from collections.abc import Iterator

# The first test waits for the installation, from a registry that may be slow.
pytestmark = [pytest.mark.node, pytest.mark.timeout(400)]

ROOT: Final = Path(__file__).parents[2]
CLIENT: Final = ROOT / "client"
SERVED: Final = ROOT / "gateway/edge/static/client.js"
CORE_BYTES: Final = 10_000
"""The promised size of the core, gzipped: of what its `GatewayChatTransport` adds to an app."""
WHOLE_BYTES: Final = 11 * 1024
"""The same of all that the package exports but React's hook, which is the module that the gateway serves."""
RUN_SECONDS: Final = 300.0
BROWSER_GLOBALS: Final = (
    "window", "self", "document", "location", "navigator", "localStorage", "sessionStorage", "crypto",
    "fetch", "WebSocket", "EventSource", "addEventListener", "setTimeout", "setInterval", "queueMicrotask",
)  # fmt: skip
APP: Final = {
    "index.html": '<!doctype html><div id="root"></div><script type="module" src="/src/main.jsx"></script>',
    "src/main.jsx": """
        import { createRoot } from 'react-dom/client'
        import { Page } from './page'
        createRoot(document.getElementById('root')).render(<Page />)
    """,
    "src/page.tsx": """
        import { useChat } from '@ai-sdk/react'
        import { GatewayChatTransport } from '@session-gateway/client'
        import { useGatewayChat } from '@session-gateway/client/react'

        const transport = new GatewayChatTransport({ url: 'https://gateway.example' })

        export function Page() {
          const { messages } = useChat({ id: 'one', transport })
          const { sendMessage, stop, connection } = useGatewayChat({ id: 'two', transport })
          return (
            <main data-state={connection.state}>
              {messages.map(message => <p key={message.id}>{message.role}</p>)}
              <button onClick={() => void sendMessage({ text: 'hi' })}>Send</button>
              <button onClick={() => void stop()}>Stop</button>
            </main>
          )
        }
    """,
    "tsconfig.json": json.dumps({
        "compilerOptions": {
            "strict": True, "exactOptionalPropertyTypes": True, "noEmit": True, "skipLibCheck": True,
            "target": "ES2022", "lib": ["ES2022", "DOM"], "types": [],
            "jsx": "react-jsx", "module": "ESNext", "moduleResolution": "bundler",
        },
        "include": ["src/page.tsx"],
    }),
}  # fmt: skip
"""A Vite app as small as they get, except that it uses all that the package exports."""


def run(*command: str, folder: Path) -> str:
    """Run a program to its end; the test fails with all it said."""
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=RUN_SECONDS, check=False
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def tool(name: str) -> str:
    """Return a program of the client's lock: the app is without tools of its own."""
    return str(CLIENT / "node_modules/.bin" / name)


def write_app(folder: Path) -> None:
    """Write the app and what it asks for, at the versions of the client's lock."""
    pinned: dict[str, str] = json.loads((CLIENT / "package.json").read_text())["devDependencies"]
    asked = {name: pinned[name] for name in ("ai", "@ai-sdk/react", "react", "react-dom", "@types/react")}
    package = {"name": "app", "private": True, "type": "module", "dependencies": asked}
    for name, text in {**APP, "package.json": json.dumps(package)}.items():
        file = folder / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    # What those need in turn is what npm has fetched for the client before, so its cache holds all of it.
    shutil.copy(CLIENT / "package-lock.json", folder)


@pytest.fixture(scope="module")
def tarball(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``npm publish`` would upload."""
    assert (CLIENT / "dist/index.js").exists(), "unable to find client/dist; run make client"
    folder = tmp_path_factory.mktemp("packed")
    run("npm", "pack", "--silent", "--pack-destination", str(folder), folder=CLIENT)
    (packed,) = folder.iterdir()
    return packed


@pytest.fixture(scope="module")
def app(tarball: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The app, with the tarball installed by npm beside what its peers are."""
    folder = tmp_path_factory.mktemp("app")
    write_app(folder)
    quiet = ("--prefer-offline", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error")
    run("npm", "install", *quiet, str(tarball), folder=folder)
    return folder


def packed_texts(tarball: Path) -> Iterator[tuple[str, str]]:
    with tarfile.open(tarball) as packed:
        for member in packed.getmembers():
            file = packed.extractfile(member)
            assert file is not None, f"{member.name} is no file"
            yield member.name.removeprefix("package/"), file.read().decode()


def test_the_tarball_holds_what_the_source_gives_and_nothing_else(tarball: Path) -> None:
    """No tests, no sources, nothing of the machine it was built on, no leftover of an older build."""
    modules = [file.relative_to(CLIENT / "src").with_suffix("") for file in (CLIENT / "src").rglob("*.ts")]
    built = {f"dist/{module}{ending}" for module in modules for ending in (".js", ".d.ts")}
    assert {name for name, _ in packed_texts(tarball)} == {"package.json", "README.md", "LICENSE", *built}


def test_no_packed_file_names_a_folder_of_the_machine(tarball: Path) -> None:
    """Who built it and where is nobody's business; and a link to a source that is not there is of no use."""
    unwanted = (str(CLIENT), "file://", "sourceMappingURL")
    found = {name: [text for text in unwanted if text in content] for name, content in packed_texts(tarball)}
    assert {name: texts for name, texts in found.items() if texts} == {}


def test_it_installs_into_an_empty_vite_app_and_builds(app: Path) -> None:
    """What a newcomer does first."""
    run(tool("vite"), "build", "--logLevel", "warn", folder=app)
    scripts = "".join(file.read_text() for file in (app / "dist/assets").glob("*.js"))
    assert "gateway/v1/" in scripts


@pytest.mark.parametrize("module", ["ESNext", "NodeNext"])
def test_its_types_are_found_by_a_strict_app(app: Path, module: str) -> None:
    """Bundlers and Node look types up in different ways."""
    resolution = "bundler" if module == "ESNext" else module
    run(tool("tsc"), "--project", ".", "--module", module, "--moduleResolution", resolution, folder=app)


def test_installing_it_brings_nothing_along(app: Path) -> None:
    """Everything else is the app's."""
    package = json.loads((app / "node_modules/@session-gateway/client/package.json").read_text())
    assert not package.get("dependencies")
    assert not (app / "node_modules/@session-gateway/client/node_modules").exists()


def test_importing_the_core_touches_no_global_of_a_browser(app: Path) -> None:
    """A page that is rendered on a server imports it where there is no window, and starts nothing there."""
    script = f"""
        for (const name of {json.dumps(BROWSER_GLOBALS)}) {{
          const get = () => {{ throw new Error(`unable to import it without ${{name}}`) }}
          Object.defineProperty(globalThis, name, {{ get, configurable: true }})
        }}
        const {{ GatewayChatTransport }} = await import('@session-gateway/client')
        if (typeof GatewayChatTransport !== 'function') throw new Error('unable to find the transport')
    """
    run(node_binary(), "--input-type=module", "--eval", script, folder=app)


def test_importing_the_hook_needs_no_window(app: Path) -> None:
    """A server renders the component that uses it. React and the AI SDK may look round as they like."""
    script = "import { useGatewayChat } from '@session-gateway/client/react'"
    run(node_binary(), "--input-type=module", "--eval", script, folder=app)


def test_what_an_app_does_not_use_is_not_in_its_bundle(app: Path) -> None:
    """The whole is free of side effects, and told so."""
    (app / "src/unused.js").write_text(
        "import '@session-gateway/client'\nimport '@session-gateway/client/react'"
    )
    assert run(tool("esbuild"), "src/unused.js", "--bundle", "--format=esm", folder=app) == ""


def test_the_core_costs_an_app_less_than_ten_kilobytes(app: Path) -> None:
    """What `import { GatewayChatTransport }` adds to a bundle: minified, with all carriers, gzipped."""
    (app / "src/core.js").write_text("export { GatewayChatTransport } from '@session-gateway/client'")
    bundling = ("--bundle", "--minify", "--format=esm", "--platform=browser", "--target=es2022")
    run(tool("esbuild"), "src/core.js", *bundling, "--outfile=core.min.js", folder=app)
    bundle = (app / "core.min.js").read_bytes()
    assert all(carrier in bundle for carrier in (b'"websocket"', b'"sse"', b'"long-poll"'))
    size = len(gzip.compress(bundle, compresslevel=9))
    assert size < CORE_BYTES, f"the core is {size} bytes gzipped; it may have {CORE_BYTES - 1}"


def test_the_served_module_is_below_eleven_kibibytes() -> None:
    """All that a plain page can import, `observe` and the errors as well: as a server sends it."""
    size = len(gzip.compress(SERVED.read_bytes(), compresslevel=9))
    assert size < WHOLE_BYTES, f"the module is {size} bytes gzipped; it may have {WHOLE_BYTES - 1}"


def test_the_served_module_is_whole_and_what_the_source_gives(tmp_path: Path) -> None:
    """A plain page has no bundler to find an import with; and what is measured here is not an older build."""
    fresh = tmp_path / "client.js"
    run(
        "npm",
        "run",
        "--silent",
        "bundle",
        "--",
        f"--outfile={fresh}",
        "--metafile=" + str(tmp_path / "meta.json"),
        folder=CLIENT,
    )
    assert fresh.read_bytes() == SERVED.read_bytes(), "the module is not of this source; run make client"
    (output,) = json.loads((tmp_path / "meta.json").read_text())["outputs"].values()
    assert output["imports"] == []


def test_the_type_of_every_public_name_is_tested() -> None:
    """A name that the next version lacks, or has otherwise, breaks the build of whoever uses it."""
    index, react = ((CLIENT / "src" / name).read_text() for name in ("index.ts", "react.ts"))
    blocks = re.findall(r"^export (?:type )?\{(.*?)\}", index, re.MULTILINE | re.DOTALL)
    # `type A, B`: the last word is the name.
    names = {("core", entry.split()[-1]) for entry in ",".join(blocks).split(",") if entry.strip()}
    names |= {("react", name) for name in re.findall(r"^export \w+ (\w+)", react, re.MULTILINE)}
    tested = set(re.findall(r"\b(core|react)\.(\w+)", (CLIENT / "tests/types.test-d.ts").read_text()))
    assert ("core", "GatewayChatTransport") in names
    assert names - tested == set()
