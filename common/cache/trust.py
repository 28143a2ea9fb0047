"""One hash for a whole cache, to pin and to sign.

    manifest identity ──> h ──(number and SHA-256 of seal 0)──> h ──(… of seal 1)──> h ── ... ──> root
    seal ──> SHA-256 of every file of its part

So a root stands for every byte that a reader decodes. The index is not in it: it repeats what parts hold, and
a reader holds it to them.
"""

import base64
import hashlib
import hmac
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from common.cache import layout
from common.cache.documents import parse_document
from common.cache.places import Place, as_store
from common.cache.seals import MAX_SEAL_BYTES, read_manifest, read_seal, sealed_parts
from common.errors import CacheError, ConfigError, MismatchError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

ROOT_PATTERN: Final = r"^sha256:[0-9a-f]{64}$"
"""How a root is written."""

SIGNATURE_SUFFIX: Final = ".sig"
"""A signature lies beside its cache, never inside: `l1.sig`."""

_CONTEXT: Final = b"cascache root 1\n"
_ALGORITHM: Final = "ed25519"
_MAX_SIGNATURE_BYTES: Final = 4096
_MAX_KEY_BYTES: Final = 16384


def root_hash(place: Place) -> str:
    """The hash over the manifest's identity and all seals in order, as `sha256:…`.

    Args:
        place: The cache's store, directory or URL.

    Raises:
        CacheError: There is no cache, or its manifest or a seal is damaged.
    """
    store = as_store(place)
    digest = hashlib.sha256(_CONTEXT + bytes.fromhex(layout.identity_sha256(read_manifest(store)))).digest()
    for part in sorted(sealed_parts(store)):
        read_seal(store, part)  # well formed, and names nothing outside the cache
        seal = hashlib.sha256(store.read(layout.seal_key(part), max_bytes=MAX_SEAL_BYTES)).digest()
        digest = hashlib.sha256(digest + part.to_bytes(8, "little") + seal).digest()
    return f"sha256:{digest.hex()}"


def require_root(place: Place, wanted: str) -> None:
    """Refuse a cache that is not the pinned one.

    Raises:
        ConfigError: `wanted` is no root.
        MismatchError: The cache has another root.
    """
    if not re.fullmatch(ROOT_PATTERN, wanted):
        raise ConfigError(
            f"{wanted!r} is no root hash; give sha256: and 64 hex digits, as `cascache info` does"
        )
    store = as_store(place)
    found = root_hash(store)
    if not hmac.compare_digest(found, wanted):
        raise MismatchError(
            f"{store.name} is not the cache that was pinned: found root {found}, wanted {wanted}; get the "
            f"pinned one again, or look at what differs with `cascache diff` and pin the new root"
        )


def signature_path(cache: str) -> Path:
    """Where the signature of a local cache lies unless a flag says otherwise.

    Raises:
        ConfigError: The cache is in an object store.
    """
    if "://" in cache:
        raise ConfigError(f"{cache} is no local directory; say with --signature where its signature is")
    return Path(cache.rstrip("/") + SIGNATURE_SUFFIX)


def sign_root(root: str, key: Path) -> str:
    """A detached signature of a root, as a JSON document.

    Args:
        root: What `root_hash` returned.
        key: PEM file of an Ed25519 private key.

    Raises:
        ConfigError: The key cannot be used, or `cryptography` is not installed.
    """
    signature = base64.b64encode(_private_key(key).sign(_CONTEXT + root.encode())).decode()
    return json.dumps({"algorithm": _ALGORITHM, "root": root, "signature": signature}, indent=1) + "\n"


def check_signature(root: str, signature: Path, key: Path) -> None:
    """Prove that the owner of a key signed a root.

    Args:
        root: The root of the cache as it is.
        signature: What `sign_root` wrote.
        key: PEM file of the Ed25519 public key.

    Raises:
        ConfigError: The key cannot be used, or `cryptography` is not installed.
        CacheError: There is no signature, or it is damaged.
        MismatchError: It is of another root or by another key.
    """
    public = _public_key(key)
    from cryptography.exceptions import InvalidSignature

    document = _read_signature(signature)
    if document["root"] != root:
        raise MismatchError(
            f"{signature} signs {document['root']}, the cache has root {root}: it is another cache, or was "
            f"changed since; get the signed one again"
        )
    try:
        public.verify(base64.b64decode(document["signature"], validate=True), _CONTEXT + root.encode())
    except (InvalidSignature, ValueError) as error:
        raise MismatchError(
            f"{signature} was not made with the key that {key} belongs to; ask its author which key it is"
        ) from error


def _read_signature(path: Path) -> dict[str, str]:
    try:
        with path.open("rb") as file:
            document: Any = parse_document(file.read(_MAX_SIGNATURE_BYTES))
    except FileNotFoundError as error:
        raise CacheError(f"{path} does not exist; say with --signature where it is, or sign first") from error
    except (OSError, ValueError) as error:
        raise CacheError(f"{path} is no signature ({error}); get it again from its author") from error
    wanted = {"algorithm", "root", "signature"}
    texts = isinstance(document, dict) and all(isinstance(value, str) for value in document.values())
    if not texts or document.keys() != wanted or document["algorithm"] != _ALGORITHM:
        raise CacheError(f"{path} is no {_ALGORITHM} signature of a cache; get it again from its author")
    return dict(document)


def _private_key(path: Path) -> "Ed25519PrivateKey":
    _require_cryptography()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        key = load_pem_private_key(_read_key(path), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"{path} is no private key without password in PEM ({error}); {_MAKE}") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(f"{path} is no Ed25519 key; {_MAKE}")
    return key


def _public_key(path: Path) -> "Ed25519PublicKey":
    _require_cryptography()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        key = load_pem_public_key(_read_key(path))
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"{path} is no public key in PEM ({error}); {_PUBLISH}") from error
    if not isinstance(key, Ed25519PublicKey):
        raise ConfigError(f"{path} is no Ed25519 key; {_PUBLISH}")
    return key


_MAKE: Final = "make one with `openssl genpkey -algorithm ed25519 -out key.pem`"
_PUBLISH: Final = "make one from a private key with `openssl pkey -in key.pem -pubout -out key.pub`"


def _read_key(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(_MAX_KEY_BYTES)
    except OSError as error:
        raise ConfigError(f"the key {path} cannot be read ({error}); name a PEM file with --key") from error


def _require_cryptography() -> None:
    try:
        import cryptography  # noqa: F401
    except ImportError as error:
        raise ConfigError("signatures need `cryptography`: pip install 'cascache[trust]'") from error
