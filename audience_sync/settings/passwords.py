"""Hashes of the passwords of the dashboard's users, by scrypt in the PHC form: `$scrypt$ln=15,r=8,p=3$SALT$HASH`."""

import base64
import hashlib
import hmac
import re
import secrets
import unicodedata

MIN_LENGTH = 10  # characters
_LOG_N, _R, _P = 15, 8, 3  # 32 MB
_MAX_MEMORY = 300_000_000  # slightly more than the largest parameters in PATTERN need
_FOUR = r"(?:[A-Za-z0-9+/]{4})"  # characters of base64 for three bytes
_REST = r"[A-Za-z0-9+/]{2,4}"
PATTERN = (
    r"\$scrypt\$ln=(1[2-7]),r=([1-9]|1[0-6]),p=([1-9]|1[0-6])"
    rf"\$({_FOUR}{{2,20}}{_REST})\$({_FOUR}{{10,20}}{_REST})"
)


def hash_password(password: str) -> str:
    salt = secrets.token_bytes(16)
    digest = _scrypt(password, salt, _LOG_N, _R, _P, 32)
    return f"$scrypt$ln={_LOG_N},r={_R},p={_P}${_encoded(salt)}${_encoded(digest)}"


def is_password(password: str, stored: str) -> bool:
    """Return whether a hash belongs to the password, in a time that depends only on the hash."""
    match = re.fullmatch(PATTERN, stored)
    if match is None:
        raise ValueError("not a hash in the PHC form")
    log_n, r, p = (int(match[number]) for number in (1, 2, 3))
    salt, digest = _decoded(match[4]), _decoded(match[5])
    return hmac.compare_digest(_scrypt(password, salt, log_n, r, p, len(digest)), digest)


def _scrypt(password: str, salt: bytes, log_n: int, r: int, p: int, length: int) -> bytes:
    text = unicodedata.normalize("NFKC", password).encode(errors="surrogatepass")
    return hashlib.scrypt(text, salt=salt, n=2**log_n, r=r, p=p, maxmem=_MAX_MEMORY, dklen=length)


def _encoded(data: bytes) -> str:
    return base64.b64encode(data).decode().rstrip("=")


def _decoded(text: str) -> bytes:
    return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
