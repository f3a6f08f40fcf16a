# SPDX-License-Identifier: Apache-2.0
"""Layer files where they are, for runtimes that learn from a file beside each where its hash tree is (`kata-erofs`).

Such a sidecar is derived from the layer's row. It is written before a container is first told of it, and goes with the
layer file; one that says something else is not overwritten but refused, and a start removes it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence

from blockdev.formats.layer_file import format_named
from snapshotter.activation import BrokenLayer
from snapshotter.contracts.kata_erofs import takes
from snapshotter.contracts.mount import Lower
from snapshotter.errors import DataLoss, FailedPrecondition
from snapshotter.layerstore import LayerStore
from snapshotter.made import EMPTY_TAR, Made
from snapshotter.metastore import Layer
from snapshotter.tasks import to_the_end
from snapshotter.trace import trace

# Of a tar without members: two blocks of zeros.


class Sidecars:
    def __init__(self, store: LayerStore, made: Made) -> None:
        self._store, self._made = store, made

    async def ensure(
        self, layers: Callable[[], Awaitable[Sequence[Layer]]], layer_format: str, min_layers: int
    ) -> list[Lower]:
        """The layers in their order after a look at each, their sidecars in place, and empty ones of `layer_format`
        below them where they are fewer than `min_layers`. Raises BrokenLayer, DataLoss (a sidecar),
        FailedPrecondition (a layer that cannot be named), ResourceExhausted, OSError, and what `layers` raises."""
        found = list(await layers())
        for layer in found:
            params = format_named(layer.format).params
            if not takes(format_named(layer.format)):
                raise FailedPrecondition(
                    f"layer {layer.diff_id} has format {layer.format}, with verity blocks of"
                    f" {params.data_block_bytes}/{params.hash_block_bytes} bytes, which the runtime cannot verify:"
                    " remove the image, and pull it again"
                )
        if len(found) < min_layers:
            empty = await self._made.stored(EMPTY_TAR, layer_format)
            found += [empty] * (min_layers - len(found))
        await to_the_end(asyncio.to_thread(self._look_at, {layer.id: layer for layer in found}.values()))
        return [Lower(self._store.path(each.diff_id, each.format), each.format, each.root_hash) for each in found]

    def _look_at(self, layers: Iterable[Layer]) -> None:
        for layer in layers:
            why = self._store.contradiction(layer)
            if why:
                raise BrokenLayer(layer, why)
            wrong = self._store.sidecar_contradiction(layer)
            if wrong is None:
                self._store.write_sidecar(layer)
                trace("sidecars.written")
            elif wrong:
                path = self._store.sidecar_path(layer.diff_id, layer.format)
                raise DataLoss(f"layer {layer.diff_id}: its sidecar {path} {wrong}; once removed, it is written anew")
