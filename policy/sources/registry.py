# SPDX-License-Identifier: Apache-2.0
"""Images in registries (OCI distribution specification), by the client library `oras`.

Credentials are Docker's: its configuration, credential stores and helpers. Every answer is bounded in size and time.
A registry is never believed: what it sends is checked by digest, here or by who reads the stream.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit

import requests
from oras.auth.token import TokenAuth
from oras.auth.utils import get_basic_auth, parse_auth_header
from oras.logger import logger
from oras.provider import Registry
from requests.adapters import HTTPAdapter

from policy import documents
from policy.documents import DOCUMENT_BYTES_MAX, INDEXES, MANIFESTS, Descriptor, ImageDocuments, LayerBlob, Platform
from policy.errors import RegistryError
from policy.sources.reference import DOCKER_HUB, Reference
from policy.sources.source import PIECE_BYTES, Stream, piped
from verity.buffers import Buffer

_CONNECT_SECONDS: Final = 10.0
_ANSWER_SECONDS: Final = 30.0  # without a byte
_DOCUMENT_SECONDS: Final = 60.0
# Of a blob: on average over so long, so much must come.
_SLOW_SECONDS: Final = 60.0
_SLOW_BYTES: Final = 64 << 10
_ATTEMPTS: Final = 4
_FIRST_WAIT_SECONDS: Final = 0.5
_REDIRECTS_MAX: Final = 5
_HUB_API: Final = "registry-1.docker.io"
_HUB_KEY: Final = "https://index.docker.io/v1/"  # in Docker's configuration
_ACCEPT: Final = ", ".join(sorted(MANIFESTS | INDEXES))
_PASSING: Final = frozenset({408, 429, 500, 502, 503, 504})
_WORDS_MAX: Final = 200

_T = TypeVar("_T")

logger.set_level(logging.CRITICAL)  # what it would tell a person, our errors do


class _Passing(Exception):
    """May be better the next time."""


class _Bounded(HTTPAdapter):
    """Requests have no time limits of their own."""

    def send(self, request: requests.PreparedRequest, **options: Any) -> requests.Response:  # type: ignore[override]
        if options.get("timeout") is None:
            options["timeout"] = (_CONNECT_SECONDS, _ANSWER_SECONDS)
        return super().send(request, **options)


class _Refused(Exception):
    pass


class _Auth(TokenAuth):  # type: ignore[misc]  # the library has no types
    """The library's tokens; basic credentials where a registry asks for those; never sent where others can read."""

    def __init__(self, host: str, secure: bool) -> None:
        super().__init__()
        self.token: str | None = None
        self._secure = secure
        self._auth_config = _docker_config()
        names = [host, f"https://{host}", f"http://{host}", f"https://{host}/v1/", f"https://{host}/v2/"]
        try:
            if not any(map(self._load_auth, [_HUB_KEY] if host == DOCKER_HUB else names)):
                self._basic_auth = ""
        except (ValueError, KeyError, TypeError, AttributeError, OSError, subprocess.SubprocessError) as error:
            raise RegistryError(
                f"registry {host}: no credentials from Docker's configuration: {_short(error)}"
            ) from None

    def _get_auth_from_creds_store(self, suffix: str, hostname: str) -> str | None:
        """As the library does, but what goes wrong is no warning that scrolls by, and takes no longer than it may."""
        program = f"docker-credential-{suffix}"
        done = subprocess.run(
            [program, "get"], input=hostname.encode(), capture_output=True, timeout=_ANSWER_SECONDS, check=False
        )
        said = (done.stdout + done.stderr).decode("utf-8", "replace").strip()
        if done.returncode:
            # The words of Docker's own helpers, and of those made with its library, for "none".
            if "credentials not found" in said.lower():
                return None
            raise ValueError(f"{program} ended with status {done.returncode}: {said[:_WORDS_MAX]}")
        found = json.loads(done.stdout)
        if found["Username"] == "<token>":
            raise ValueError(f"{program} has an identity token, which is not supported")
        return str(get_basic_auth(found["Username"], found["Secret"]))

    def authenticate_request(
        self, original: requests.Response, headers: dict[str, str] | None, refresh: bool = False
    ) -> tuple[dict[str, str], bool]:
        original.close()
        headers = dict(headers or {})
        challenge = original.headers.get("Www-Authenticate", "")
        if headers.pop("Authorization", None) and not self.token:
            raise _Refused("does not accept the credentials")  # these were sent already
        if challenge.lower().startswith("basic"):
            if not self._basic_auth:
                raise _Refused("asks for credentials, and Docker's configuration has none for it")
            headers["Authorization"] = f"Basic {self._basic_auth}"
            return headers, True
        realm = _realm(challenge)
        if not realm:
            raise _Refused(f"refuses with status {original.status_code}")
        if urlsplit(realm).scheme not in (("https",) if self._secure else ("https", "http")):
            raise _Refused(f"wants a token fetched from {realm[:_WORDS_MAX]!r}, which is not https")
        self.token = None
        headers, changed = super().authenticate_request(original, headers)
        if not changed or not self.token:
            said = "the credentials" if self._basic_auth else "who has no credentials"
            raise _Refused(f"its token server does not accept {said}")
        return headers, True


def _realm(challenge: str) -> str:
    return (parse_auth_header(challenge).realm or "") if challenge.lower().startswith("bearer") else ""


def _docker_config() -> dict[str, Any]:
    """Of $DOCKER_CONFIG, else of the home directory. Raises RegistryError where it is none."""
    path = Path(os.environ.get("DOCKER_CONFIG") or Path.home() / ".docker") / "config.json"
    try:
        document = json.loads(path.read_bytes())
        if not isinstance(document, dict):
            raise ValueError("no object")
    except FileNotFoundError:
        document = {}
    except (OSError, ValueError) as error:
        raise RegistryError(f"{path} is no configuration of Docker's: {error}") from None
    return {
        "auths": dict(document.get("auths") or {}),
        "credsStore": document.get("credsStore"),
        "credHelpers": dict(document.get("credHelpers") or {}),
    }


class _Endpoint:
    """One host, by one thread."""

    def __init__(self, host: str, repository: str, plain_http: bool) -> None:
        self.host = host
        self._base = f"{'http' if plain_http else 'https'}://{_HUB_API if host == DOCKER_HUB else host}/v2/{repository}"
        self._registry = Registry(host, insecure=plain_http)
        session = self._registry.session
        for scheme in ("http://", "https://"):
            session.mount(scheme, _Bounded())
        session.max_redirects = _REDIRECTS_MAX
        session.auth = lambda request: request  # else ~/.netrc would take the place of what is sent
        self._auth = _Auth(host, not plain_http)
        self._auth.session, self._auth._tls_verify = session, True
        self._auth.prefix = self._registry.prefix
        self._registry.auth = self._auth

    def get(self, path: str, headers: Mapping[str, str]) -> requests.Response:
        """A streamed answer with status 200 or 206. Raises _Passing; RegistryError for what will not pass."""
        url = f"{self._base}/{path}"
        try:
            # Without the library's own retries, which go on for minutes whatever the reason.
            ask = Registry.do_request.__wrapped__
            response: requests.Response = ask(self._registry, url, headers=dict(headers), stream=True)
        except _Refused as error:
            raise RegistryError(f"registry {self.host} {error}") from None
        except requests.TooManyRedirects:
            raise RegistryError(f"registry {self.host} redirects over {_REDIRECTS_MAX} times: {path}") from None
        except requests.exceptions.SSLError as error:
            raise RegistryError(f"registry {self.host}: {error}; --plain-http, if it has no TLS") from None
        except (requests.ConnectionError, requests.Timeout) as error:
            raise _Passing(f"does not answer: {_short(error)}") from None
        except (requests.RequestException, ValueError, KeyError) as error:
            raise RegistryError(f"registry {self.host}: {path}: {_short(error)}") from None
        status = response.status_code
        if status in (200, 206):
            return response
        response.close()
        if status in _PASSING:
            raise _Passing(f"answers with status {status}")
        if status == 404:
            raise RegistryError(f"registry {self.host} has no {path}")
        if status in (401, 403):
            raise RegistryError(f"registry {self.host} refuses {path} with status {status}: wrong or no credentials")
        raise RegistryError(f"registry {self.host} answers with status {status} to {path}")

    def close(self) -> None:
        self._registry.session.close()


def _short(error: Exception) -> str:
    return str(error)[:_WORDS_MAX]


def _pieces(response: requests.Response, size_max: int) -> Iterator[bytes]:
    """As they come, not when a buffer is full: so who sends byte by byte is noticed. Raises _Passing."""
    left = size_max
    try:
        # Not what the library calls content: that undoes a Content-Encoding.
        while left > 0 and (piece := response.raw.read1(min(left, PIECE_BYTES), decode_content=False)):
            left -= len(piece)
            yield piece
    except Exception as error:  # urllib3 has its own, http.client and socket theirs
        if not isinstance(error, OSError) and type(error).__module__.partition(".")[0] not in ("urllib3", "http"):
            raise
        raise _Passing(f"breaks off: {_short(error)}") from None


class RegistrySource:
    def __init__(self, reference: str, plain_http: bool, mirrors: Mapping[str, tuple[str, ...]]) -> None:
        self.reference = Reference.parse(reference)
        self.name = reference
        self._plain_http = plain_http
        self._hosts = (*mirrors.get(self.reference.host, ()), self.reference.host)
        self._sleep: Callable[[float], None] = time.sleep

    def image(self, wanted: Platform | None) -> ImageDocuments:
        where = self.reference.digest or self.reference.tag
        text, media_type = self._fetched(f"manifests/{where}", {"Accept": _ACCEPT}, DOCUMENT_BYTES_MAX)
        digest = documents.digest_of(text)
        if self.reference.digest and digest != self.reference.digest:
            raise documents.OtherBytes(f"image {self.name}: the registry gave {digest} for {self.reference.digest}")
        within = documents.media_type_within(text, f"image {self.name}: {digest}")
        root = Descriptor(digest, len(text), media_type if media_type in MANIFESTS | INDEXES else within)
        known = {digest: text}

        def document(descriptor: Descriptor) -> bytes:
            if descriptor.digest in known:
                return known[descriptor.digest]
            kind = "manifests" if descriptor.media_type in MANIFESTS | INDEXES else "blobs"
            size = min(descriptor.size, DOCUMENT_BYTES_MAX)
            found, _ = self._fetched(
                f"{kind}/{descriptor.digest}", {"Accept": _ACCEPT if kind != "blobs" else "*/*"}, size
            )
            return documents.check_document(descriptor, found, self.name)

        return documents.resolved(self.name, root, document, wanted)

    @contextmanager
    def blob(self, layer: LayerBlob) -> Iterator[Stream]:
        with piped(lambda write: self._download(layer, write)) as stream:
            yield stream

    def close(self) -> None:
        pass

    def _fetched(self, path: str, headers: Mapping[str, str], size_max: int) -> tuple[bytes, str]:
        """The bytes, one more than `size_max` at most, and the media type."""

        def read(endpoint: _Endpoint) -> tuple[bytes, str]:
            ends = time.monotonic() + _DOCUMENT_SECONDS
            text = b""
            with closing(endpoint.get(path, headers)) as response:
                for piece in _pieces(response, size_max + 1):
                    text += piece
                    if time.monotonic() > ends:
                        raise RegistryError(f"registry {endpoint.host} takes over {_DOCUMENT_SECONDS:.0f} s for {path}")
                if len(text) > size_max:
                    raise RegistryError(f"registry {endpoint.host}: {path} has over {size_max} bytes")
                return text, response.headers.get("Content-Type", "").partition(";")[0].strip()

        return self._tried(read)

    def _download(self, layer: LayerBlob, write: Callable[[Buffer], None]) -> None:
        """One that broke off goes on where it did, if the registry can do that."""
        done = 0

        def read(endpoint: _Endpoint) -> None:
            nonlocal done
            headers = {"Range": f"bytes={done}-"} if done else {}
            with closing(endpoint.get(f"blobs/{layer.digest}", headers)) as response:
                skip = done if response.status_code == 200 else 0
                since, moved = time.monotonic(), 0
                for piece in _pieces(response, sys.maxsize):
                    moved += len(piece)
                    fresh = piece[skip:]
                    skip -= min(skip, len(piece))
                    if layer.size_bytes is not None and done + len(fresh) > layer.size_bytes:
                        raise documents.OtherBytes(
                            f"image {self.name}: layer {layer.digest}: the registry sends over {layer.size_bytes} bytes"
                        )
                    started = time.monotonic()
                    write(fresh)
                    done += len(fresh)
                    since += time.monotonic() - started  # the reader's own time is not the registry's
                    if (now := time.monotonic()) - since > _SLOW_SECONDS:
                        if moved < _SLOW_BYTES:
                            raise RegistryError(
                                f"registry {endpoint.host} is too slow: {moved} bytes of blobs/{layer.digest}"
                                f" in {_SLOW_SECONDS:.0f} s"
                            )
                        since, moved = now, 0
                if layer.size_bytes is not None and done < layer.size_bytes:
                    raise _Passing(f"ends blobs/{layer.digest} after {done} of {layer.size_bytes} bytes")

        self._tried(read)

    def _tried(self, work: Callable[[_Endpoint], _T]) -> _T:
        """By the mirrors first; the registry itself has the last word. Raises RegistryError."""
        for host in self._hosts:
            last = host == self._hosts[-1]
            wait = _FIRST_WAIT_SECONDS
            local = Reference(host, "").is_local
            for attempt in range(1, _ATTEMPTS + 1):
                try:
                    with closing(_Endpoint(host, self.reference.repository, self._plain_http or local)) as endpoint:
                        return work(endpoint)
                except RegistryError as error:
                    if last:
                        raise RegistryError(f"image {self.name}: {error}") from None
                    break
                except _Passing as error:
                    if attempt == _ATTEMPTS:
                        if last:
                            raise RegistryError(
                                f"image {self.name}: registry {host} {error}, {attempt} times"
                            ) from None
                        break
                self._sleep(wait)
                wait *= 2
        raise AssertionError("unreachable")
