"""Shards from a web server with TLS: certificates are checked against what this machine trusts."""

from __future__ import annotations

import datetime
import ipaddress
import ssl
from pathlib import Path

import pytest
from web import serving

from sivae_dist.data.faults import StorageError
from sivae_dist.data.shard_read import ShardReader, load_manifest
from sivae_dist.data.store import Access, FolderStore, open_store

pytestmark = pytest.mark.slow  # needs a package of the dev extra


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A certificate of 127.0.0.1 that signs itself, with its key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    signed = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path = tmp_path / "server.pem"
    path.write_bytes(secret + signed.public_bytes(serialization.Encoding.PEM))
    return path


def test_a_server_with_a_certificate(packed: Path, certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trusted, the same bytes as on disk; not trusted, an error at once."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    access = Access(cache_gb=0, read_timeout_s=5, limit_s=20, retries=1)
    with serving(packed, context) as server:
        assert server.url.startswith("https://")
        with pytest.raises(StorageError, match="certificate is not valid"):
            load_manifest(open_store(server.url, access))
        assert server.asked == []
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        store = open_store(server.url, access)
        manifest = load_manifest(store)
        theirs, ours = (ShardReader(s, manifest, manifest.shards) for s in (store, FolderStore(packed)))
        assert theirs.encoded(0, 0) == ours.encoded(0, 0)
        store.close()
