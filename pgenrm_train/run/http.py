"""Connections to language models: proxies, certificates and keys, as the environment gives them.

A mistake in the environment is a ConfigError that names the variable.  This machine's own addresses are never
called through a proxy, which could not reach them.
"""

import functools
import importlib.util
import ipaddress
import os
import re
import ssl
import sys
import urllib.request
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from pgenrm_train.errors import ConfigError, first_line

if TYPE_CHECKING:
    import httpx

PROXIES = ("http", "https", "socks5", "socks5h")
COMPLETIONS = "/chat/completions"


def service(base_url: str, path: str) -> str:
    """The address of `path` at an API; a base URL that already names the completions is accepted."""
    return base_url.rstrip("/").removesuffix(COMPLETIONS) + path


def key_of(variable: str) -> str:
    """The key in an environment variable, without white space at its ends.

    Raises ConfigError for a variable that is not set, and for a key that no request can carry.
    """
    key = os.environ.get(variable, "").strip()
    if not key:
        state = "is blank" if variable in os.environ else "is not set"
        raise ConfigError(f"the environment variable {variable} named by api_key_env {state}")
    odd = re.search(r"[^!-~]", key)
    if odd or key[0] in "'\"" or key[-1] in "'\"":
        what = "white space" if odd and odd[0].isspace() else repr(odd[0] if odd else key[0])
        raise ConfigError(
            f"the key in {variable} holds {what}, which no key has; export it again without quotes and blanks"
        )
    return key


def proxy_for(url: str) -> str | None:
    """The proxy that the environment names for `url`.  Raises ConfigError if it cannot be used."""
    parts = urlsplit(url)
    scheme, host = parts.scheme, parts.hostname or ""
    variable, proxy = _proxy_variable(scheme)
    if not proxy or _is_excepted(host, parts.port):
        return None
    kind, _, rest = proxy.partition("://")
    kind, trouble = kind.lower(), None
    if kind not in PROXIES:
        trouble = f"{variable} begins with {kind}://, and a proxy is one of {', '.join(PROXIES)}"
    elif kind.startswith("socks") and not importlib.util.find_spec("socksio"):
        trouble = f"{variable} names a SOCKS proxy, which needs the package socksio (pip install socksio)"
    elif not _names_host(proxy):
        trouble = f"{variable} names no host, or a port that is no number"
    if _is_here(host):
        if trouble:
            print(f"warning: {trouble}; {host} is called without it", file=sys.stderr, flush=True)
        return None
    if trouble:
        raise ConfigError(f"{trouble}; correct or unset it, or add {host} to NO_PROXY")
    return f"{kind}://{rest}"


def _names_host(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return bool(parts.hostname) and parts.port != 0 and not re.search(r"\s", url)
    except ValueError:
        return False


def _is_excepted(host: str, port: int | None) -> bool:
    """Whether NO_PROXY names the host: as a name, a domain (also `*.domain`), an address or a network."""
    entries = urllib.request.getproxies_environment().get("no", "").lower().split(",")
    for entry in map(str.strip, entries):
        name = re.sub(r"^\*?\.", "", entry).rstrip(".")
        named = name and any(f".{asked}".endswith(f".{name}") for asked in (host, f"{host}:{port}"))
        if entry == "*" or named or _holds(entry, host, port):
            return True
    return False


def _holds(entry: str, host: str, port: int | None) -> bool:
    """Whether an address or network of NO_PROXY, in brackets or not, holds an address."""
    bracketed = re.fullmatch(r"\[(.*)\](?::(\d+))?", entry)
    if bracketed and bracketed[2] and int(bracketed[2]) != port:
        return False
    try:
        network = ipaddress.ip_network(bracketed[1] if bracketed else entry, strict=False)
        return ipaddress.ip_address(host) in network
    except ValueError:
        return False


def _proxy_variable(scheme: str) -> tuple[str, str]:
    """(name, value) of the variable for this scheme; empty if none is set."""
    for name in (f"{scheme}_proxy", "all_proxy"):
        for variable in (name, name.upper()):
            if value := os.environ.get(variable, "").strip():
                return variable, value if "://" in value else f"http://{value}"
    return "", ""


def _is_here(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


@functools.cache
def certificates(file: str | None, folder: str | None) -> ssl.SSLContext:
    """Certificates to trust: those of SSL_CERT_FILE or SSL_CERT_DIR, else certifi's."""
    import certifi

    for variable, path, exists in (
        ("SSL_CERT_FILE", file, os.path.isfile),
        ("SSL_CERT_DIR", folder, os.path.isdir),
    ):
        if path and not all(map(exists, path.split(os.pathsep) if exists is os.path.isdir else [path])):
            kind = "folder" if exists is os.path.isdir else "file"
            raise ConfigError(f"{variable}={path} names no {kind} that exists; correct or unset it")
    try:
        return ssl.create_default_context(
            cafile=file or (None if folder else certifi.where()), capath=folder or None
        )
    except OSError as error:  # ssl.SSLError is one
        raise ConfigError(f"SSL_CERT_FILE={file} holds no certificates ({first_line(error)})") from None


def trusted() -> ssl.SSLContext:
    """The certificates that the environment names.  Raises ConfigError if they cannot be read."""
    return certificates(os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR"))


def client(url: str, *, direct: bool = False, **settings: Any) -> "httpx.Client":
    """An `httpx.Client` for requests to `url`, with further `settings` of httpx; `direct`: by no proxy."""
    import httpx

    proxy = None if direct else proxy_for(url)
    return httpx.Client(verify=trusted(), proxy=proxy, trust_env=False, **settings)


def lost_connection(error: BaseException, proxy: str | None = None) -> tuple[str, str, bool]:
    """(kind, words, whether it may pass) of an error of httpx or aiohttp without an answer.

    The words name the `proxy` of the call, which may be at fault.
    """
    chain = list(_chain(error))
    place = urlsplit(proxy or "")
    via = f"; the call went to the proxy {place.hostname}:{place.port or 80}" if proxy else ""
    words = " ".join(str(error).split()) or type(error).__name__
    if any(isinstance(e, ssl.SSLCertVerificationError) or "CERTIFICATE_VERIFY" in str(e) for e in chain):
        text = next((str(e) for e in chain if "CERTIFICATE_VERIFY" in str(e)), words)
        reason = re.sub(r".*?(CERTIFICATE_VERIFY_FAILED)\]?", r"\1", " ".join(text.split()))
        reason = re.sub(r" \(_ssl\.c:.*", "", reason)
        return "tls", f"{reason[:120]}; SSL_CERT_FILE names a file with the certificate to trust", False
    if any("WRONG_VERSION_NUMBER" in str(e) or "record layer failure" in str(e) for e in chain):
        return "tls", "the server speaks no TLS; base_url may need http:// in place of https://", False
    if any(isinstance(e, TimeoutError) or "Timeout" in type(e).__name__ for e in chain):
        return "timeout", f"no complete answer in time ({type(error).__name__}){via}", True
    return "connection", f"{type(error).__name__}: {words}"[:200] + via, True


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
