# SPDX-License-Identifier: Apache-2.0
"""Signatures of an image's layers beside it in a registry: an OCI artifact whose subject is the image's manifest.

Its form is Microsoft's (artifact type, media type of layers, annotations). A registry without the referrers API keeps
the list of referrers as an index under a tag made of the subject's digest (OCI distribution specification 1.1,
"Referrers Tag Schema"): who pushes adds to it, and of two who push at the same moment one may be lost.
"""

from __future__ import annotations

import base64
import json
from contextlib import closing
from typing import Any, Final
from urllib.parse import urljoin

import requests
from oras.provider import Registry

from policy.chain import is_digest
from policy.documents import digest_of
from policy.errors import RegistryError, SignatureError
from policy.signature_store import SignedImage, SignedLayer, signed_layer

ARTIFACT_TYPE: Final = "application/vnd.oci.mt.pkcs7"
DOCUMENT_BYTES_MAX: Final = 4 << 20
_LAYER_TYPE: Final = "application/vnd.oci.image.layer.v1.erofs.sig"
_EMPTY_TYPE: Final = "application/vnd.oci.empty.v1+json"
_MANIFEST_TYPE: Final = "application/vnd.oci.image.manifest.v1+json"
_INDEX_TYPE: Final = "application/vnd.oci.image.index.v1+json"
_ACCEPT: Final = f"{_MANIFEST_TYPE}, {_INDEX_TYPE}, application/vnd.docker.distribution.manifest.v2+json"
_EMPTY: Final = b"{}"
_DIGEST, _ROOT_HASH, _SIGNATURE = "image.layer.digest", "image.layer.root_hash", "image.layer.signature"
_ARTIFACTS_MAX: Final = 16  # of one image, that are looked into


class SignatureRegistry:
    """`repository`: "host:port/path". `client`: one of the library, with the credentials that it needs."""

    def __init__(self, repository: str, client: Registry) -> None:
        host, _, path = repository.partition("/")
        self._repository, self._client = repository, client
        self._base = f"{client.prefix}://{host}/v2/{path}"

    def push(self, subject: str, image: SignedImage) -> str:
        """The artifact's digest. `subject`: the digest of the image's manifest, which has to be there.

        Raises RegistryError. The list is written last: what fails before it leaves blobs that nothing names.
        """
        raw, media_type = self._manifest(subject)
        if digest_of(raw) != subject:
            raise RegistryError(f"{self._repository}@{subject}: the registry sent other bytes")
        layers = []
        for layer in image.layers:
            signature = base64.b64encode(layer.signature).decode("ascii")
            blob = _json({"layer_digest": layer.digest, "root_hash": layer.root_hash, "signature": signature})
            name = f"signature_for_layer_{layer.digest.removeprefix('sha256:')}.json"
            annotations = {
                _DIGEST: layer.digest,
                _ROOT_HASH: layer.root_hash,
                _SIGNATURE: signature,
                "signature.blob.name": name,
            }
            layers.append(self._blob(blob, _LAYER_TYPE) | {"annotations": annotations})
        annotations = {"image.ref.name": image.name}
        manifest = _json(
            {
                "schemaVersion": 2,
                "mediaType": _MANIFEST_TYPE,
                "artifactType": ARTIFACT_TYPE,
                "config": self._blob(_EMPTY, _EMPTY_TYPE),
                "layers": layers,
                "subject": {"mediaType": media_type, "digest": subject, "size": len(raw)},
                "annotations": annotations,
            }
        )
        digest = digest_of(manifest)
        answer = self._put_manifest(digest, manifest, _MANIFEST_TYPE)
        if answer.headers.get("OCI-Subject") != subject:
            tag = subject.replace(":", "-")
            listed = [each for each in self._listed(tag) if each.get("digest") != digest]
            listed.append(
                {
                    "mediaType": _MANIFEST_TYPE,
                    "digest": digest,
                    "size": len(manifest),
                    "artifactType": ARTIFACT_TYPE,
                    "annotations": annotations,
                }
            )
            index = {"schemaVersion": 2, "mediaType": _INDEX_TYPE, "manifests": listed}
            self._put_manifest(tag, _json(index), _INDEX_TYPE)
        return digest

    def fetch(self, subject: str) -> list[SignedImage]:
        """Of all artifacts with signatures, which are not verified here; empty where there is none.

        Raises RegistryError, SignatureError (an artifact that is not what it should be)."""
        if not is_digest(subject):
            raise RegistryError(f"{self._repository}: {subject[:80]!r} is no digest")
        answer = self._get(f"referrers/{subject}")
        found = _referrers(answer[0]) if answer else self._listed(subject.replace(":", "-"))
        digests = [str(each.get("digest")) for each in found if each.get("artifactType") == ARTIFACT_TYPE]
        if len(digests) > _ARTIFACTS_MAX:
            raise RegistryError(f"{self._repository}@{subject}: over {_ARTIFACTS_MAX} artifacts with signatures")
        return [self._artifact(digest, subject) for digest in digests]

    def _artifact(self, digest: str, subject: str) -> SignedImage:
        where = f"{self._repository}@{digest[:80]}"
        if not is_digest(digest):
            raise RegistryError(f"{where}: no digest")
        raw, _ = self._manifest(digest)
        if digest_of(raw) != digest:
            raise RegistryError(f"{where}: the registry sent other bytes")
        try:
            manifest = json.loads(raw)
            if manifest["subject"]["digest"] != subject:
                raise SignatureError(f"{where}: its subject is not {subject}")
            layers: list[SignedLayer] = []
            for layer in manifest["layers"]:
                notes = layer["annotations"]
                layers.append(signed_layer(notes[_DIGEST], notes[_ROOT_HASH], notes[_SIGNATURE]))
            name = str(manifest.get("annotations", {}).get("image.ref.name", where))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise SignatureError(f"{where}: no artifact with signatures: {type(error).__name__}: {error}") from None
        return SignedImage(name, tuple(layers))

    def _listed(self, tag: str) -> list[dict[str, Any]]:
        answer = self._get(f"manifests/{tag}")
        return _referrers(answer[0]) if answer else []

    def _manifest(self, digest: str) -> tuple[bytes, str]:
        answer = self._get(f"manifests/{digest}")
        if answer is None:
            raise RegistryError(f"{self._repository}@{digest}: not there")
        return answer

    def _get(self, path: str) -> tuple[bytes, str] | None:
        """None where it is not there."""
        with closing(self._request("GET", f"{self._base}/{path}", headers={"Accept": _ACCEPT}, stream=True)) as answer:
            if answer.status_code == 404:
                return None
            self._check(answer, path)
            raw = b""
            try:
                for piece in answer.iter_content(64 << 10):
                    raw += piece
                    if len(raw) > DOCUMENT_BYTES_MAX:
                        raise RegistryError(f"{self._repository}: {path}: over {DOCUMENT_BYTES_MAX} bytes")
            except requests.RequestException as error:
                raise RegistryError(f"{self._repository}: {path}: {error}") from None
            return raw, answer.headers.get("Content-Type", "")

    def _blob(self, raw: bytes, media_type: str) -> dict[str, Any]:
        """Its descriptor, once it is there."""
        digest = digest_of(raw)
        with closing(self._request("HEAD", f"{self._base}/blobs/{digest}")) as there:
            known = there.status_code == 200
        if not known:
            with closing(self._request("POST", f"{self._base}/blobs/uploads/")) as begun:
                self._check(begun, "blobs/uploads/")
                target = urljoin(f"{self._base}/", begun.headers.get("Location", ""))
            target += f"{'&' if '?' in target else '?'}digest={digest}"
            headers = {"Content-Type": "application/octet-stream"}
            with closing(self._request("PUT", target, headers=headers, data=raw)) as done:
                self._check(done, f"blobs/{digest}")
        return {"mediaType": media_type, "digest": digest, "size": len(raw)}

    def _put_manifest(self, name: str, raw: bytes, media_type: str) -> requests.Response:
        url = f"{self._base}/manifests/{name}"
        with closing(self._request("PUT", url, headers={"Content-Type": media_type}, data=raw)) as answer:
            self._check(answer, f"manifests/{name}")
            return answer

    def _request(self, method: str, url: str, **more: Any) -> requests.Response:
        try:
            response: requests.Response = self._client.do_request(url, method, **more)
        except (requests.RequestException, ValueError) as error:
            raise RegistryError(f"{self._repository}: {method} {url}: {error}") from None
        return response

    def _check(self, answer: requests.Response, what: str) -> None:
        if answer.status_code >= 300:
            raise RegistryError(f"{self._repository}: {what}: the registry answers {answer.status_code}")


def _referrers(raw: bytes) -> list[dict[str, Any]]:
    """Raises RegistryError."""
    try:
        found = json.loads(raw)["manifests"]
    except (ValueError, KeyError, TypeError, RecursionError):
        found = None
    if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
        raise RegistryError("a list of referrers that is no OCI index")
    return found


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
