"""Reads the bodies of HTTP requests to the tracking API in bounded memory."""

import zlib

from starlette.requests import Request

from audience_sync.intake.refusals import RefusalError

MAX_BATCH_BYTES = 500 * 1024
# How much of an oversized body is read, because many senders read the answer only at its end.
MAX_READ_BYTES = 4 * MAX_BATCH_BYTES
_GZIP = {"gzip", "x-gzip"}  # the second is its old name


async def read_body(request: Request, max_bytes: int) -> bytes:
    """Read and decompress the body; never hold more than `max_bytes` of it in memory."""
    encoding = request.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding not in {"identity", *_GZIP, ""}:
        raise RefusalError(400, "Content-Encoding must be gzip, or absent")
    received = bytearray()
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > MAX_READ_BYTES:
            break
        if size <= max_bytes:
            received += chunk
    if size > max_bytes:
        raise _too_large(max_bytes)
    return _decompressed(received, max_bytes) if encoding in _GZIP else bytes(received)


def _decompressed(received: bytearray, max_bytes: int) -> bytes:
    decompressor = zlib.decompressobj(wbits=31)
    try:
        body = decompressor.decompress(received, max_bytes + 1)
    except zlib.error as error:
        raise RefusalError(400, "the body is not gzip") from error
    if len(body) > max_bytes:
        raise _too_large(max_bytes)
    if not decompressor.eof or decompressor.unused_data:
        raise RefusalError(400, "the body is not valid gzip: it ends early, or more data follows")
    return body


def _too_large(max_bytes: int) -> RefusalError:
    message = f"the body is larger than {max_bytes // 1024} KB"
    return RefusalError(413, message, {"Connection": "close"})  # the rest of the body is not read
