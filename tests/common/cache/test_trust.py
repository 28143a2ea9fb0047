"""A root hash stands for every byte that a reader decodes; a signature for the root."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from common.cache import cli, layout
from common.cache.hashing import hash_files
from common.cache.places import open_store
from common.cache.reader import CacheReader
from common.cache.seals import read_seal
from common.cache.trust import ROOT_PATTERN, check_signature, require_root, root_hash, sign_root
from common.cache.verify import verify
from common.cache.writer import CacheWriter
from common.errors import CacheError, ConfigError, MismatchError, PartCorrupt
from tests.common.cache.records import make_manifest, make_records
from tests.common.cache.test_verify import rewrite


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    path = tmp_path_factory.mktemp("trust") / "l1"
    writer = CacheWriter.open(str(path), make_manifest())
    for part in range(2):
        records = make_records(np.random.default_rng(part), 3, first=3 * part)
        writer.write_part(part, records, first_sample=3 * part, num_samples=3)
    writer.finalize()
    return path


@pytest.fixture
def cache(pristine, tmp_path):
    return Path(shutil.copytree(pristine, tmp_path / "l1"))


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """Two Ed25519 pairs, and a private key of another kind."""
    directory = tmp_path_factory.mktemp("keys")
    for name in ("ours", "theirs"):
        write_pair(directory / name, ed25519.Ed25519PrivateKey.generate())
    write_pair(directory / "curve", ec.generate_private_key(ec.SECP256R1()))
    return directory


def write_pair(path, key):
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    public = key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    path.with_suffix(".pem").write_bytes(private)
    path.with_suffix(".pub").write_bytes(public)


def test_a_copy_has_the_same_root_wherever_it_lies(cache, pristine):
    assert root_hash(str(cache)) == root_hash(str(pristine)) == root_hash(open_store(f"file://{cache}"))
    shutil.rmtree(cache / "index")
    assert root_hash(str(cache)) == root_hash(str(pristine))


CHANGES = {
    "manifest": lambda c: rewrite(c / "zarr.json", lambda a: a.update(vocab_size=299)),
    "seal": lambda c: rewrite(c / "seals/00000/zarr.json", lambda a: a["errors"].update(x=1.0)),
    "last seal": lambda c: rewrite(c / "seals/00001/zarr.json", lambda a: a["errors"].update(x=1.0)),
    "part gone": lambda c: shutil.rmtree(c / "seals/00001"),
    "seals swapped": lambda c: swap_seals(c),
}


def swap_seals(cache):
    """Two seals whose bytes change places: the same set of seals, in another order."""
    texts = [(cache / f"seals/0000{n}/zarr.json").read_bytes() for n in (0, 1)]
    for number, text in enumerate(reversed(texts)):
        (cache / f"seals/0000{number}/zarr.json").write_bytes(text)


@pytest.mark.parametrize("name", CHANGES)
def test_any_change_of_manifest_or_seals_is_another_root(cache, pristine, name):
    wanted = root_hash(str(pristine))
    CHANGES[name](cache)
    with pytest.raises((MismatchError, CacheError)):
        require_root(str(cache), wanted)
    with pytest.raises(ConfigError, match="no root hash"):
        require_root(str(cache), wanted.removeprefix("sha256:"))


def flip(path):
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)


def test_a_proven_reader_hashes_every_file_it_decodes(cache):
    base = cache / "parts" / read_seal(cache, 1).directory
    for path in sorted(p for p in base.rglob("*") if p.is_file()):
        data = path.read_bytes()
        flip(path)
        with CacheReader(str(cache), proven=True) as reader:
            reader.read_record("sample-0")
            with pytest.raises(PartCorrupt, match="SHA-256"):
                reader.read_record("sample-4")
        path.write_bytes(data)
    with CacheReader(str(cache), proven=True) as reader:
        assert [reader.read_record(n).sample_id for n in reader.sample_ids] == list(reader.sample_ids)


def test_an_index_cannot_leave_samples_out(cache):
    other = cache.with_name("other")
    writer = CacheWriter.open(str(other), make_manifest())
    records = make_records(np.random.default_rng(0), 2)
    seal = read_seal(cache, 0)
    writer._check = lambda *_, **__: None
    writer.write_part(0, records, first_sample=0, num_samples=3)
    part = read_seal(other, 0)
    shutil.rmtree(other / "parts" / part.directory)
    shutil.copytree(cache / "parts" / seal.directory, other / "parts" / part.directory)
    files = {name: file.model_dump() for name, file in hash_files(other / "parts" / part.directory).items()}
    rewrite(other / "seals/00000/zarr.json", lambda a: a.update(files=files))
    with pytest.raises(PartCorrupt, match="its seal says 2"):
        CacheReader(str(other), proven=True)


def test_signatures_bind_root_and_key(cache, keys):
    root, signature = root_hash(str(cache)), cache.with_name("l1.sig")
    signature.write_text(sign_root(root, keys / "ours.pem"))
    check_signature(root, signature, keys / "ours.pub")
    with pytest.raises(MismatchError, match="not made with the key"):
        check_signature(root, signature, keys / "theirs.pub")
    with pytest.raises(MismatchError, match="another cache"):
        check_signature("sha256:" + "0" * 64, signature, keys / "ours.pub")
    forged = json.loads(signature.read_text()) | {"root": "sha256:" + "0" * 64}
    signature.write_text(json.dumps(forged))
    with pytest.raises(MismatchError, match="not made with the key"):
        check_signature("sha256:" + "0" * 64, signature, keys / "ours.pub")


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"algorithm": "none", "root": "", "signature": ""}', "[" * 9000]
)
def test_what_is_no_signature_is_an_error_of_ours(cache, keys, text):
    path = cache.with_name("l1.sig")
    path.write_text(text)
    with pytest.raises(CacheError, match=r"no .*signature"):
        check_signature(root_hash(str(cache)), path, keys / "ours.pub")


@pytest.mark.parametrize("name", ["curve.pem", "ours.pub", "missing"])
def test_other_keys_are_refused(keys, name):
    with pytest.raises(ConfigError, match="key"):
        sign_root("sha256:" + "0" * 64, keys / name)


def test_without_cryptography_it_says_how_to_install_it(cache, keys, monkeypatch):
    monkeypatch.setitem(sys.modules, "cryptography", None)
    with pytest.raises(ConfigError, match=r"pip install 'cascache\[trust\]'"):
        sign_root("sha256:" + "0" * 64, keys / "ours.pem")


def run(*arguments):
    try:
        return cli.main([str(each) for each in arguments])
    except SystemExit as stop:
        return stop.code


def test_the_commands_pin_and_sign(cache, keys, capsys):
    assert run("info", cache, "--json") == 0
    root = json.loads(capsys.readouterr().out)["root"]
    assert root == root_hash(str(cache))
    assert run("sign", cache, "--key", keys / "ours.pem") == 0
    assert run("verify", cache, "--expect", root, "--key", keys / "ours.pub", "--json") == 0
    capsys.readouterr()
    assert run("verify", cache, "--key", keys / "theirs.pub") == 2
    assert run("verify", cache, "--expect", "sha256:" + "1" * 64) == 2
    assert "not the cache that was pinned" in capsys.readouterr().err
    assert not verify(str(cache)).problems, "a signature lies beside the cache, not inside"


def test_nothing_broken_is_signed(cache, keys, capsys):
    base = cache / "parts" / read_seal(cache, 0).directory
    flip(base / "sample_tokens" / "c.0.0")
    assert run("sign", cache, "--key", keys / "ours.pem") == 1
    assert not cache.with_name("l1.sig").exists()
    assert "SHA-256" in capsys.readouterr().out


def test_a_root_is_what_the_documentation_says(cache):
    """The definition, written out once more without any of the code it tests."""
    identity = json.loads((cache / "seals/00000/zarr.json").read_bytes())["attributes"]["identity_sha256"]
    value = hashlib.sha256(b"cascache root 1\n" + bytes.fromhex(identity)).digest()
    for part in (0, 1):
        seal = hashlib.sha256((cache / f"seals/0000{part}/zarr.json").read_bytes()).digest()
        value = hashlib.sha256(value + part.to_bytes(8, "little") + seal).digest()
    assert root_hash(str(cache)) == f"sha256:{value.hex()}"
    assert re.fullmatch(ROOT_PATTERN, root_hash(str(cache)))
    assert layout.identity_sha256(make_manifest()) == identity


def test_keys_of_openssl_work(cache, tmp_path):
    key, public = tmp_path / "key.pem", tmp_path / "key.pub"
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl")
    for command in (
        ["genpkey", "-algorithm", "ed25519", "-out", str(key)],
        ["pkey", "-in", str(key), "-pubout", "-out", str(public)],
    ):
        subprocess.run(["openssl", *command], check=True, capture_output=True)
    signature = tmp_path / "l1.sig"
    signature.write_text(sign_root(root_hash(str(cache)), key))
    check_signature(root_hash(str(cache)), signature, public)
