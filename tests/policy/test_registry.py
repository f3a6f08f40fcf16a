# SPDX-License-Identifier: Apache-2.0
"""Images in registries: real ones, with and without credentials; and servers that misbehave on purpose."""

from __future__ import annotations

import base64
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from typer.testing import CliRunner

from policy.hashed import HashedImage
from policy.image_hash import hash_image
from policy.sources import Access, opened, registry
from snapshotter.cli.main import app
from tests.conftest import in_every_run
from tests.harness import Registry
from tests.policy.layouts import INDEX, MANIFEST, Layout, small_tar

# User "owner", password "secret": a bcrypt hash, as htpasswd -B writes it.
HTPASSWD = "owner:$2y$05$abcdefghijklmnopqrstuuOQiyCxlgf/oeuTqixKmWdcYUh4Hjl0a\n"
AUTH = base64.b64encode(b"owner:secret").decode()
WRONG = base64.b64encode(b"owner:other").decode()
TARS = [small_tar("one"), small_tar("two" * 100_000)]


@pytest.fixture
def docker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """Writes Docker's configuration; it is empty to begin with."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    (tmp_path / "docker").mkdir()

    def write(content: Any) -> None:
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / "docker/config.json").write_text(text)

    return write


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_FIRST_WAIT_SECONDS", 0.01)


def hashed(reference: str, **access: Any) -> HashedImage:
    with opened(reference, Access(**access)) as source:
        return hash_image(source, ["tar-index"])["tar-index"]


def refused(reference: str, why: str, *arguments: str) -> None:
    result = CliRunner().invoke(app, ["image", "hash", "--json", reference, *arguments], catch_exceptions=False)
    assert (result.exit_code, result.stdout) == (1, "")
    assert re.search(why, result.stderr), result.stderr
    assert reference in result.stderr
    assert result.stderr.count("\n") == 1


# --- a real one


@pytest.mark.tool
def test_a_real_registry(images: Path, tmp_path: Path, docker: Callable[[Any], None]) -> None:
    server = Registry(tmp_path / "registry")
    server.start()
    try:
        reference = server.push(images / "layers-mixed.tar", "a/b/layers:1")
        expected = hashed(f"oci-archive:{images / 'layers-mixed.tar'}")
        for text in (reference, f"docker://{reference}", f"{reference}@{expected.digest}"):
            found = hashed(text)
            assert (found.digest, found.layers, found.on_top) == (expected.digest, expected.layers, expected.on_top)
        assert expected.on_top is not None
        by_mirror = hashed("registry.invalid/a/b/layers:1", mirrors={"registry.invalid": (server.host,)})
        assert by_mirror.layers == expected.layers
        refused(f"{server.host}/a/b/layers:2", "has no manifests/2")
        refused(f"{server.host}/a/b/layers@sha256:{'0' * 64}", "has no manifests/sha256:0")
    finally:
        server.stop()


@pytest.fixture
def guarded(images: Path, tmp_path: Path) -> Iterator[tuple[Registry, str]]:
    """docker-registry that asks for basic credentials, with an image that was pushed before it did."""
    open_one = Registry(tmp_path / "registry")
    open_one.start()
    reference = open_one.push(images / "hello.tar", "hello:1")
    open_one.stop()
    (tmp_path / "htpasswd").write_text(HTPASSWD)

    class Guarded(Registry):
        def _answers(self) -> bool:
            import urllib.error
            import urllib.request

            try:
                urllib.request.urlopen(f"http://{self.host}/v2/", timeout=5)
            except urllib.error.HTTPError as error:
                return error.code == 401
            except OSError:
                pass
            return False

        def start(self) -> None:
            original = Path.write_text

            def with_auth(path: Path, text: str) -> int:
                return original(path, f"{text}auth: {{htpasswd: {{realm: r, path: {tmp_path}/htpasswd}}}}\n")

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Path, "write_text", with_auth)
                super().start()

    server = Guarded(tmp_path / "registry")
    server.port, server.host = open_one.port, open_one.host
    server.start()
    yield server, reference
    server.stop()


@pytest.mark.tool
def test_basic_credentials(
    guarded: tuple[Registry, str], tmp_path: Path, docker: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, reference = guarded
    refused(reference, "asks for credentials, and Docker's configuration has none for it")
    docker({"auths": {server.host: {"auth": AUTH}}})
    assert len(hashed(reference).layers) == 1
    docker({"auths": {f"https://{server.host}/v2/": {"auth": AUTH}}})
    assert len(hashed(reference).layers) == 1
    docker({"auths": {server.host: {"auth": WRONG}}})
    refused(reference, "refuses manifests/1 with status 401: wrong or no credentials")
    docker("{")
    refused(reference, "is no configuration of Docker's")

    helper = tmp_path / "bin/docker-credential-mine"
    helper.parent.mkdir()
    monkeypatch.setenv("PATH", f"{helper.parent}:/usr/bin:/bin")

    def says(text: str) -> None:
        helper.write_text(f"#!/bin/sh\n[ \"$1\" = get ] && grep -q '^{server.host}$' && {{ {text}; }}\n")
        helper.chmod(0o755)

    says("""echo '{"Username": "owner", "Secret": "secret"}'""")
    for config in ({"credsStore": "mine"}, {"credHelpers": {server.host: "mine"}}):
        docker(config)
        assert len(hashed(reference).layers) == 1
    says("echo no JSON")
    refused(reference, "no credentials from Docker's configuration")
    says("exit 1")
    refused(reference, "no credentials from Docker's configuration: docker-credential-mine ended with status 1")
    says("echo credentials not found in native keychain; exit 1")
    refused(reference, "asks for credentials, and Docker's configuration has none for it")
    helper.unlink()
    refused(reference, "no credentials from Docker's configuration: .*docker-credential-mine")


# --- servers made for it


class Server:
    """An OCI layout by HTTP. `answer` may take a request: it gives True where it has answered."""

    def __init__(self, layout: Layout) -> None:
        self.layout, self.requests = layout, list[str]()
        self.answer: Callable[[BaseHTTPRequestHandler], bool] = lambda request: False
        self.top = ""
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                outer.requests.append(self.path)
                if not outer.answer(self):
                    outer.serve(self)

            def log_message(self, *arguments: object) -> None:
                pass

        class Quiet(ThreadingHTTPServer):
            def handle_error(self, *arguments: object) -> None:
                pass  # the client went away

        self.http = Quiet(("127.0.0.1", 0), Handler)
        self.host = f"127.0.0.1:{self.http.server_address[1]}"

    def content(self, request: BaseHTTPRequestHandler) -> tuple[bytes, str] | None:
        name = urlsplit(request.path).path.rpartition("/")[2]
        digest = self.top if name == "latest" else name
        path = self.layout.blobs / digest.removeprefix("sha256:")
        if not digest.startswith("sha256:") or not path.exists():
            return None
        return path.read_bytes(), MANIFEST if "/manifests/" in request.path else "application/octet-stream"

    def serve(self, request: BaseHTTPRequestHandler) -> None:
        found = self.content(request)
        if found is None:
            send(request, 404, b"")
            return
        send(request, 200, found[0], {"Content-Type": found[1]})


def send(
    request: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str] | None = None, length: int = -1
) -> bool:
    request.send_response(status)
    for name, value in (headers or {}).items():
        request.send_header(name, value)
    request.send_header("Content-Length", str(len(body) if length < 0 else length))
    request.end_headers()
    request.wfile.write(body)
    if length >= 0:
        request.close_connection = True
    return True


@contextmanager
def serving(layout: Layout, tars: list[bytes] = TARS) -> Iterator[Server]:
    server = Server(layout)
    server.top = layout.manifest(tars)["digest"]
    thread = threading.Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.http.shutdown()
        server.http.server_close()


@pytest.fixture
def server(tmp_path: Path, docker: Callable[[Any], None], quick: None) -> Iterator[Server]:
    with serving(Layout(tmp_path / "layout")) as made:
        yield made


def for_blobs(server: Server, answer: Callable[[BaseHTTPRequestHandler, bytes], bool], tar: int = 1) -> str:
    """For one layer's blob, `answer`; the digest of it."""
    digest: str = server.layout.layer(TARS[tar])["digest"]
    content = (server.layout.blobs / digest.removeprefix("sha256:")).read_bytes()
    server.answer = lambda request: digest in request.path and answer(request, content)
    return digest


def test_the_server_of_these_tests_serves(server: Server) -> None:
    assert len(hashed(f"{server.host}/a").layers) == 2


OTHER = {
    "other bytes": lambda content: content[:-1] + bytes([content[-1] ^ 1]),
    "another layer": lambda content: content[::-1],
}


@pytest.mark.parametrize("name", OTHER)
def test_other_bytes(server: Server, name: str) -> None:
    digest = for_blobs(server, lambda request, content: send(request, 200, OTHER[name](content)))
    refused(f"{server.host}/a", rf"image .*: layer {digest}: blob has digest sha256:\w+, not {digest}")


def test_more_bytes(server: Server) -> None:
    digest = for_blobs(server, lambda request, content: send(request, 200, content + b"more"))
    refused(f"{server.host}/a", f"layer {digest}: (the registry sends over|blob is longer than)")


def test_an_end_before_the_end(server: Server) -> None:
    """Cut short by itself, whatever is asked for, and with a length that says so or not."""
    digest = for_blobs(server, lambda request, content: send(request, 200, content[:-9]))
    refused(f"{server.host}/a", rf"blobs/{digest} after \d+ of \d+ bytes, 4 times")
    for_blobs(server, lambda request, content: send(request, 200, content[:-9], length=len(content)))
    refused(f"{server.host}/a", r"breaks off: .*, 4 times")


@pytest.mark.parametrize("ranges", in_every_run([True, False], bool))
def test_what_broke_off_goes_on(server: Server, ranges: bool) -> None:
    """Once with a registry that can go on, once with one that begins again."""
    times = 0

    def answer(request: BaseHTTPRequestHandler, content: bytes) -> bool:
        nonlocal times
        times += 1
        match = re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range", ""))
        assert bool(match) == (times > 1)
        start = int(match[1]) if match and ranges else 0
        part, whole = content[start : 100 * times if times < 3 else None], content[start:]
        return send(request, 206 if match and ranges else 200, part, length=len(whole))

    for_blobs(server, answer)
    found = hashed(f"{server.host}/a")
    server.answer = lambda request: False
    assert found.layers == hashed(f"{server.host}/a").layers
    assert times == 3


def test_what_passes_is_tried_again(server: Server) -> None:
    failures = iter([503, 429, 500])

    def answer(request: BaseHTTPRequestHandler) -> bool:
        status = next(failures, 0)
        return bool(status) and send(request, status, b"")

    server.answer = answer
    assert len(hashed(f"{server.host}/a").layers) == 2
    server.answer = lambda request: send(request, 502, b"")
    refused(f"{server.host}/a", "answers with status 502, 4 times")


def test_redirects(server: Server) -> None:
    def answer(request: BaseHTTPRequestHandler) -> bool:
        return send(request, 307, b"", {"Location": request.path})

    server.answer = answer
    refused(f"{server.host}/a", "redirects over 5 times: manifests/latest")
    assert len(server.requests) <= 7
    digest = for_blobs(server, lambda request, content: send(request, 302, b"", {"Location": f"{request.path}?a"}))
    refused(f"{server.host}/a", f"redirects over 5 times: blobs/{digest}")
    # As registries with a store elsewhere do.
    for_blobs(
        server,
        lambda request, content: "?" not in request.path and send(request, 307, b"", {"Location": f"{request.path}?b"}),
    )
    assert len(hashed(f"{server.host}/a").layers) == 2


def trickle(request: BaseHTTPRequestHandler) -> bool:
    request.send_response(200)
    request.send_header("Content-Length", "2000")
    request.end_headers()
    for _ in range(2000):
        request.wfile.write(b" ")
        time.sleep(0.02)
    return True


def test_slow_answers(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_DOCUMENT_SECONDS", "_SLOW_SECONDS", "_ANSWER_SECONDS"):
        monkeypatch.setattr(registry, name, 0.3)
    started = time.monotonic()
    server.answer = trickle
    refused(f"{server.host}/a", r"takes over \S+ s for manifests/latest")
    digest = for_blobs(server, lambda request, content: trickle(request))
    refused(f"{server.host}/a", f"is too slow: .*{digest}")
    server.answer = lambda request: threading.Event().wait(0.6) or True
    refused(f"{server.host}/a", "does not answer: .*timed out.*, 4 times")
    assert time.monotonic() - started < 20


def test_nobody_there(server: Server) -> None:
    server.http.shutdown()
    server.http.server_close()
    refused(f"{server.host}/a", "does not answer: .*, 4 times")


def test_another_manifest_than_the_digest_says(server: Server) -> None:
    other = server.layout.manifest(TARS[:1])["digest"]
    wanted = server.top
    path = server.layout.blobs / other.removeprefix("sha256:")
    server.answer = lambda request: send(request, 200, path.read_bytes(), {"Content-Type": MANIFEST})
    refused(f"{server.host}/a@{wanted}", f"the registry gave {other} for {wanted}")


def test_a_document_that_never_ends(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "DOCUMENT_BYTES_MAX", 1000)
    server.answer = lambda request: send(request, 200, b" " * 100_000)
    refused(f"{server.host}/a", "manifests/latest has over 1000 bytes")


def test_what_is_no_manifest(server: Server) -> None:
    server.answer = lambda request: send(request, 200, b"<html>", {"Content-Type": "text/html"})
    refused(f"{server.host}/a", "image .*/a: sha256:")


def test_mirrors_come_first_and_are_not_needed(server: Server, tmp_path: Path) -> None:
    with serving(Layout(tmp_path / "mirror")) as mirror:
        assert len(hashed(f"{server.host}/a", mirrors={server.host: (mirror.host,)}).layers) == 2
        assert mirror.requests
        assert not server.requests
        mirror.answer = lambda request: send(request, 404, b"")
        assert len(hashed(f"{server.host}/a", mirrors={server.host: (mirror.host,)}).layers) == 2
        refused(f"{server.host}/b:2", "has no manifests/2", "--mirror", f"{server.host}={mirror.host}")


class Tokens:
    """A token server of its own, beside a registry that wants its tokens (distribution: docs/spec/auth/token.md)."""

    def __init__(self, server: Server) -> None:
        self.server, self.asked = server, list[str]()
        self.realm = f"http://{server.host}/token"
        server.answer = self.answer

    def answer(self, request: BaseHTTPRequestHandler) -> bool:
        authorization = request.headers.get("Authorization", "")
        if request.path.startswith("/token"):
            self.asked.append(authorization)
            query = parse_qs(urlsplit(request.path).query)
            assert query == {"service": ["here"], "scope": ["repository:a:pull"]}
            if authorization not in ("", f"Basic {AUTH}"):
                return send(request, 401, b"")
            return send(request, 200, json.dumps({"token": f"t{len(authorization)}"}).encode())
        if authorization == f"Bearer t{len('Basic ' + AUTH)}":
            return False
        challenge = f'Bearer realm="{self.realm}",service="here",scope="repository:a:pull"'
        return send(request, 401, b"", {"Www-Authenticate": challenge})


def test_tokens(server: Server, docker: Callable[[Any], None]) -> None:
    tokens = Tokens(server)
    refused(f"{server.host}/a", "refuses manifests/latest with status 401: wrong or no credentials")
    assert set(tokens.asked) == {""}
    docker({"auths": {server.host: {"auth": WRONG}}})
    refused(f"{server.host}/a", "its token server does not accept the credentials")
    docker({"auths": {server.host: {"auth": AUTH}}})
    assert len(hashed(f"{server.host}/a").layers) == 2
    tokens.realm = "file:///etc/passwd"
    refused(f"{server.host}/a", "wants a token fetched from 'file:///etc/passwd', which is not https")


def test_an_index_in_a_registry(server: Server) -> None:
    listed = [{**server.layout.manifest(TARS), "platform": {"os": "linux", "architecture": "amd64"}}]
    top = server.layout.put({"schemaVersion": 2, "mediaType": INDEX, "manifests": listed}, INDEX)
    server.top = top["digest"]

    def answer(request: BaseHTTPRequestHandler) -> bool:
        found = server.content(request)
        return "latest" in request.path and found is not None and send(request, 200, found[0], {"Content-Type": INDEX})

    server.answer = answer
    image = hashed(f"{server.host}/a")
    assert (image.index_digest, image.digest) == (top["digest"], listed[0]["digest"])
    refused(f"{server.host}/a", "none for linux/s390x; there is linux/amd64", "--platform", "linux/s390x")
