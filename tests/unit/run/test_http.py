"""Proxies, certificates and keys from the environment: obeyed, or refused in a sentence with the variable."""

import contextlib

import httpx
import pytest
from llm_server import serve

from pgenrm_train.backends.api.endpoint import Endpoint
from pgenrm_train.backends.api.generator import EndpointGenerator
from pgenrm_train.backends.protocols import GenerationRequest
from pgenrm_train.backends.vllm import server as vllm_server
from pgenrm_train.cluster.preflight.reach import endpoint_problems
from pgenrm_train.config import EndpointConfig
from pgenrm_train.errors import BackendError, ConfigError
from pgenrm_train.run.http import client, key_of, proxy_for, service, trusted

AWAY = "http://api.example/v1"


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.mark.parametrize(
    ("variable", "value", "proxy"),
    [
        ("HTTP_PROXY", "http://proxy:3128", "http://proxy:3128"),
        ("http_proxy", "proxy:3128", "http://proxy:3128"),
        ("ALL_PROXY", "https://proxy:3128", "https://proxy:3128"),
        ("HTTPS_PROXY", "http://proxy:3128", None),
        ("HTTP_PROXY", " ", None),
        ("HTTP_PROXY", "HTTP://proxy:3128", "http://proxy:3128"),
    ],
)
def test_a_proxy_is_taken_from_the_environment(variable, value, proxy, monkeypatch):
    monkeypatch.setenv(variable, value)
    assert proxy_for(AWAY) == proxy
    monkeypatch.setenv("NO_PROXY", "api.example")
    assert proxy_for(AWAY) is None


@pytest.mark.parametrize(
    ("url", "entry", "excepted"),
    [
        ("http://[2001:db8::1]:8000/v1", "[2001:db8::1]", True),
        ("http://[2001:db8::1]:8000/v1", "[2001:db8::1]:8000", True),
        ("http://[2001:db8::1]:8000/v1", "[2001:db8::1]:80", False),
        ("http://[2001:db8::1]:8000/v1", "2001:DB8:0::1", True),
        ("http://[2001:db8::1]:8000/v1", "x, 2001:db8::/32", True),
        ("http://10.1.2.3:8000/v1", "10.0.0.0/8", True),
        ("http://10.1.2.3:8000/v1", "11.0.0.0/8", False),
        ("http://10.1.2.3:8000/v1", "10.1.2.3:80", False),
        ("http://api.internal.example/v1", "*.example", True),
        ("http://api.internal.example/v1", " EXAMPLE. ", True),
        ("http://api.internal.example/v1", "*", True),
        ("http://api.internal.example/v1", "*.other,", False),
    ],
)
def test_no_proxy_names_hosts_domains_addresses_and_networks(url, entry, excepted, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://proxy:3128")
    monkeypatch.setenv("NO_PROXY", entry)
    assert (proxy_for(url) is None) == excepted


def test_several_folders_of_certificates_are_read_or_named(monkeypatch, tmp_path):
    monkeypatch.setenv("SSL_CERT_DIR", f"{tmp_path}:{tmp_path}")
    trusted()
    monkeypatch.setenv("SSL_CERT_DIR", f"{tmp_path}:{tmp_path / 'none'}")
    with pytest.raises(ConfigError, match="none names no folder that exists"):
        trusted()


def test_a_blank_key_is_not_called_unset(monkeypatch):
    monkeypatch.setenv("KEY", " \n")
    with pytest.raises(ConfigError, match="KEY named by api_key_env is blank"):
        key_of("KEY")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("socks://127.0.0.1:7890", "ALL_PROXY begins with socks://"),
        ("socks4://127.0.0.1:7890", "ALL_PROXY begins with socks4://"),
        ("ftp://user:secret@proxy", "ALL_PROXY begins with ftp://"),
        ("http://", "ALL_PROXY names no host"),
        ("http://proxy:port", "ALL_PROXY names no host, or a port"),
        ("http://proxy:99999", "ALL_PROXY names no host, or a port"),
        ("http://[::1", "ALL_PROXY names no host"),
        ("http://pro xy:1", "ALL_PROXY names no host"),
    ],
)
def test_a_proxy_that_cannot_be_used_is_one_sentence(value, words, monkeypatch, capsys):
    monkeypatch.setenv("ALL_PROXY", value)
    with pytest.raises(ConfigError, match=words) as error:
        client(AWAY)
    assert "NO_PROXY" in str(error.value) and "secret" not in str(error.value)
    [problem] = endpoint_problems("teacher", EndpointConfig(base_url=AWAY))
    assert words in problem
    assert proxy_for("http://localhost:8000/v1") is None, "and no reason not to ask this machine"
    assert words in capsys.readouterr().err


def test_a_socks_proxy_without_its_package_is_one_sentence(monkeypatch):
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:7890")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="ALL_PROXY names a SOCKS proxy, which needs the package socksio"):
        proxy_for(AWAY)


def test_a_proxy_that_does_not_answer_is_named(monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://us:secret@127.0.0.1:9")
    settings = EndpointConfig(kind="endpoint", base_url=AWAY, name="m", attempts=1)
    reply = Endpoint(settings).complete([{"role": "user", "content": "q"}])
    request = GenerationRequest("k", ({"role": "user", "content": "q"},))
    model = Endpoint(settings)
    with pytest.raises(BackendError, match=r"failed 1 call .*; the call went to the proxy 127\.0\.0\.1:9"):
        list(EndpointGenerator(model)([request], temperature=0.7))
    [problem] = endpoint_problems("teacher", settings)
    for words in (reply.words, model.usage.words["connection"], problem):
        assert "; the call went to the proxy 127.0.0.1:9" in words and "secret" not in words


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "ALL_PROXY"])
def test_this_machine_is_never_asked_through_a_proxy(variable, monkeypatch, tmp_path):
    monkeypatch.setenv(variable, "http://127.0.0.1:9")
    with serve(lambda body, n: "hi") as server:
        settings = EndpointConfig(kind="endpoint", base_url=server.url, name="m", attempts=1)
        assert Endpoint(settings).complete([{"role": "user", "content": "q"}]).text == "hi"
        request = GenerationRequest("k", ({"role": "user", "content": "q"},))
        [generation] = EndpointGenerator(Endpoint(settings))([request], temperature=0.7)
        assert generation.text == "hi" and not list(endpoint_problems("teacher", settings))
        monkeypatch.setattr(vllm_server, "START_SECONDS", 2)
        vllm_server._wait(lambda: None, server.url, tmp_path / "log")


def test_a_served_vllm_on_another_node_is_asked_without_a_proxy(monkeypatch, tmp_path):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "socks://127.0.0.1:9")
    with serve(lambda body, n: "hi") as server:
        # The resolver knows this spelling of 127.0.0.1, `ipaddress` does not: it stands for a node.
        url = server.url.replace("127.0.0.1", "127.1")
        assert proxy_for(url), "any other server there is asked through the proxy"
        vllm = EndpointConfig(kind="vllm", base_url=url, name="m", attempts=1)
        assert Endpoint(vllm).complete([{"role": "user", "content": "q"}]).text == "hi"
        other = Endpoint(EndpointConfig(kind="endpoint", base_url=url, name="m", attempts=1))
        assert other.complete([{"role": "user", "content": "q"}]).failure == "connection"
        monkeypatch.setattr(vllm_server, "START_SECONDS", 2)
        vllm_server._wait(lambda: None, url.removesuffix("/v1"), tmp_path / "log")


def test_others_are_asked_through_the_proxy_by_every_role(monkeypatch):
    with serve(lambda body, n: "by proxy") as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url.removesuffix("/v1"))
        settings = EndpointConfig(kind="endpoint", base_url=AWAY, name="m", attempts=1)
        assert Endpoint(settings).complete([{"role": "user", "content": "q"}]).text == "by proxy"
        request = GenerationRequest("k", ({"role": "user", "content": "q"},))
        [generation] = EndpointGenerator(Endpoint(settings))([request], temperature=0.7)
        assert generation.text == "by proxy"


@pytest.mark.parametrize("content", [None, "no certificate"])
@pytest.mark.parametrize("variable", ["SSL_CERT_FILE", "SSL_CERT_DIR"])
def test_certificates_that_are_not_there_are_one_sentence(variable, content, monkeypatch, tmp_path):
    path = tmp_path / "ca.pem"
    if content:
        path.write_text(content)
    monkeypatch.setenv(variable, str(path))
    with pytest.raises(ConfigError, match=f"{variable}={path}"):
        trusted()


@pytest.mark.parametrize("key", ["sk-abc", "sk-abc\n", " sk-abc\r\n"])
def test_white_space_around_a_key_is_none_of_it(key, monkeypatch):
    monkeypatch.setenv("KEY", key)
    assert key_of("KEY") == "sk-abc"


@pytest.mark.parametrize(
    "key", ["“sk-abc”", "sk abc", "Bearer sk-abc", "'sk-abc'", "sk-ä", "sk-\u200babc", "", " \n"]
)
def test_a_key_that_no_request_can_carry_is_refused_without_it(key, monkeypatch):
    monkeypatch.setenv("KEY", key)
    with pytest.raises(ConfigError, match=r"\bKEY\b") as error:
        Endpoint(EndpointConfig(kind="endpoint", base_url=AWAY, name="m", api_key_env="KEY"))
    [problem] = endpoint_problems("judge", EndpointConfig(base_url=AWAY, api_key_env="KEY"))
    assert "KEY" in problem
    for text in (str(error.value), problem):
        assert "abc" not in text


def test_a_base_url_may_name_the_completions():
    assert service("http://h/v1/", "/models") == service("http://h/v1/chat/completions", "/models")


def test_a_connection_is_an_ordinary_httpx_client():
    with contextlib.closing(client("http://localhost:1/v1", timeout=1.0)) as connection:
        assert isinstance(connection, httpx.Client)
