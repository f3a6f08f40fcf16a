from verity.buffers import Buffer

IMPLEMENTATIONS: tuple[str, ...]

def digests(data: Buffer, block_bytes: int, salt: bytes, implementation: str, /) -> bytes: ...
