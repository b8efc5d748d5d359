"""The settings: read once, checked whole."""

from __future__ import annotations

import pytest

from gateway.config import (
    AuthMode,
    Config,
    ConfigError,
    ListenAddress,
    load_config,
    misspelt_variables,
    settings_table,
)

UPSTREAM = "http://127.0.0.1:3000"


def problems(**variables: str) -> list[str]:
    """What a start with these variables is told."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(f"GATEWAY_{name}", value)
        with pytest.raises(ConfigError) as caught:
            load_config()
    return caught.value.problems


def test_all_problems_are_told_at_once() -> None:
    """Nobody likes to find them one start at a time."""
    told = problems(UPSTREAM="ftp://x", LISTEN="0.0.0.0:80", LEASE="-1", CHAT_PATH="foo", LOG_LEVEL="loud")
    assert sorted(problem.partition(":")[0].partition(" ")[0] for problem in told) == [
        "GATEWAY_AUTH", "GATEWAY_CHAT_PATH", "GATEWAY_LEASE", "GATEWAY_LOG_LEVEL", "GATEWAY_UPSTREAM",
    ]  # fmt: skip


def test_a_missing_upstream_says_what_it_is() -> None:
    """It is the one setting without a default, and the first error that a newcomer meets."""
    assert problems() == [
        "GATEWAY_UPSTREAM is not set. The backend's base URL, such as `http://127.0.0.1:3000`."
    ]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("UPSTREAM", "localhost:3000"),
        ("UPSTREAM", "http://user:secret@host"),
        ("UPSTREAM", "http://host/?a=1"),
        ("CHAT_PATH", "/"),
        ("CHAT_PATH", "/api/chat/"),
        ("CHAT_PATH", "/api/*x"),
        ("CHAT_PATH", ","),
        ("LISTEN", "8080"),
        ("LISTEN", "127.0.0.1:http"),
        ("LISTEN", "127.0.0.1:65536"),
        ("REDIS_URL", "postgres://x"),
        ("KEY_PREFIX", "a{b}"),
        ("ORIGINS", "*"),
        ("ORIGINS", "https://*.example.com"),
        ("ORIGINS", "example.com"),
        ("FORWARD_HEADERS", "x y"),
        ("UPSTREAM_STOP", "/api/chat/stop"),
        ("HEARTBEAT", "nan"),
        ("HEARTBEAT", "0"),
        ("MAX_BODY", "12"),
        ("ABORT", "maybe"),
        ("PASSTHROUGH", "perhaps"),
    ],
)
def test_a_bad_value_names_its_variable(name: str, value: str) -> None:
    """The operator greps for what they typed."""
    told = problems(**{"UPSTREAM": UPSTREAM, name: value})
    assert len(told) == 1
    assert told[0].startswith(f"GATEWAY_{name}: ")


def test_a_secret_in_a_bad_url_is_not_repeated() -> None:
    """Errors end up in logs."""
    assert "secret" not in str(problems(UPSTREAM="http://user:secret@host"))


@pytest.mark.parametrize("listen", ["127.0.0.1:0", "localhost:8080", "[::1]:8080", "127.9.9.9:1"])
def test_loopback_needs_no_word_about_auth(listen: str) -> None:
    """A laptop is safe by default."""
    assert Config(upstream=UPSTREAM, listen=listen).auth is None


@pytest.mark.parametrize(
    "listen", ["0.0.0.0:8080", "[::]:8080", "10.0.0.1:80", "example.com:80", "127.evil.com:80"]
)
def test_listening_to_others_needs_a_word_about_auth(listen: str) -> None:
    """An open gateway is a decision that somebody wrote down."""
    assert any("GATEWAY_AUTH" in problem for problem in problems(UPSTREAM=UPSTREAM, LISTEN=listen))
    assert Config(upstream=UPSTREAM, listen=listen, auth=AuthMode.NONE).listen == listen


def test_lists_are_separated_by_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    """As people write them in a shell."""
    monkeypatch.setenv("GATEWAY_UPSTREAM", UPSTREAM)
    monkeypatch.setenv("GATEWAY_CHAT_PATH", "/api/chat, /api/*/chat")
    monkeypatch.setenv("GATEWAY_ORIGINS", "https://App.example.com,http://localhost:3000")
    monkeypatch.setenv("GATEWAY_FORWARD_HEADERS", "X-Tenant")
    config = load_config()
    assert config.chat_paths == ("/api/chat", "/api/*/chat")
    assert config.origins == ("https://app.example.com", "http://localhost:3000")
    assert config.forward_headers == ("x-tenant",)


def test_an_empty_variable_is_an_unset_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compose files and CI write ``NAME=``."""
    monkeypatch.setenv("GATEWAY_UPSTREAM", UPSTREAM)
    monkeypatch.setenv("GATEWAY_REDIS_URL", "")
    assert load_config().redis_url is None


def test_a_misspelt_variable_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what Kubernetes sets for a service called gateway is not taken for one."""
    monkeypatch.setenv("GATEWAY_UPSTREAMS", "x")
    monkeypatch.setenv("GATEWAY_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("GATEWAY_PORT_8080_TCP", "tcp://10.0.0.1:8080")
    assert misspelt_variables() == {"GATEWAY_UPSTREAMS": "GATEWAY_UPSTREAM"}


def test_an_address_is_split_at_its_last_colon() -> None:
    """IPv6 has colons of its own."""
    address = ListenAddress("[::1]:80")
    assert (address.host, address.port, address.is_loopback) == ("::1", 80, True)


def test_the_table_has_a_row_for_each_setting() -> None:
    """And its defaults are the ones that are used."""
    table = settings_table()
    assert table.count("\n| `GATEWAY_") == len(Config.model_fields)
    assert "| `GATEWAY_HEARTBEAT` | `25` |" in table
