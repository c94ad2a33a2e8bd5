"""TLS: both files, readable, by whole paths; and our own question whether the endpoint is ready."""

from __future__ import annotations

import http.server
import ssl
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import yaml

from ftray.errors import ConfigError
from serve.config import ServeFile, listening, load_serve, parse_serve, with_absolute_paths
from serve.local import _await_ready


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `a.crt`, `a.key`, `b.key` and `locked.key`."""
    pytest.importorskip("cryptography")
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives import serialization as to
    from cryptography.hazmat.primitives.asymmetric import ec

    folder = tmp_path_factory.mktemp("tls")
    keys = {name: ec.generate_private_key(ec.SECP256R1()) for name in "ab"}
    for name, key in keys.items():
        plain = key.private_bytes(to.Encoding.PEM, to.PrivateFormat.PKCS8, to.NoEncryption())
        (folder / f"{name}.key").write_bytes(plain)
    locked = keys["a"].private_bytes(to.Encoding.PEM, to.PrivateFormat.PKCS8, to.BestAvailableEncryption(b"secret"))
    (folder / "locked.key").write_bytes(locked)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "models.example")])
    now = datetime.now(UTC)
    until = now + timedelta(days=1)
    made = x509.CertificateBuilder(name, name, keys["a"].public_key(), x509.random_serial_number(), now, until)
    certificate = made.sign(keys["a"], hashes.SHA256())
    (folder / "a.crt").write_bytes(certificate.public_bytes(to.Encoding.PEM))
    return folder


def write(folder: Path, **options: str | None) -> Path:
    application = {"import_path": "serve.app:build", "args": {"model": {"path": "embedded"}}}
    file = folder / "serve.yaml"
    file.write_text(yaml.safe_dump({"http_options": options, "applications": [application]}))
    return file


@pytest.mark.parametrize("key", ["ssl_keyfile", "ssl_certfile"])
def test_one_without_the_other_is_refused(key: str, tmp_path: Path) -> None:
    other = {"ssl_keyfile": "ssl_certfile", "ssl_certfile": "ssl_keyfile"}[key]
    text = write(tmp_path, **{key: "x.pem"}).read_text()
    with pytest.raises(ConfigError, match=f"http_options: TLS takes a certificate and its key, and {other} is not set"):
        parse_serve(text, "serve.yaml")
    with pytest.raises(ConfigError, match=f"{other} is not set"):
        parse_serve(write(tmp_path).read_text(), "serve.yaml", [f"ingress.listen={{port: 1, {key}: x.pem}}"])


@pytest.mark.parametrize(
    ("certificate", "key", "said"),
    [
        ("a.crt", "none.key", "No such file"),
        ("none.crt", "a.key", "No such file"),
        ("a.crt", "b.key", "mismatch"),
        ("a.crt", "locked.key", "TLS cannot be had"),
        ("a.key", "a.key", "TLS cannot be had"),
    ],
)
def test_files_that_are_not_there_or_do_not_fit_are_refused(
    certificates: Path, tmp_path: Path, certificate: str, key: str, said: str
) -> None:
    """By `ftray serve --check` too, which reads the file in this way."""
    files = {"ssl_certfile": str(certificates / certificate), "ssl_keyfile": str(certificates / key)}
    with pytest.raises(ConfigError) as error:
        load_serve(write(tmp_path, **files))
    assert said in str(error.value)
    assert "http_options" in str(error.value)
    listen = f"ingress.listen={{port: 1, ssl_certfile: {files['ssl_certfile']}, ssl_keyfile: {files['ssl_keyfile']}}}"
    with pytest.raises(ConfigError, match=r"ingress\.listen: TLS cannot be had"):
        load_serve(write(tmp_path), [listen])


def test_paths_become_absolute(certificates: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's processes have working directories of their own."""
    monkeypatch.chdir(certificates)
    file: ServeFile = load_serve(write(tmp_path, ssl_certfile="a.crt", ssl_keyfile="a.key"))
    listen = with_absolute_paths(listening(file)).ingress.listen
    assert listen is not None
    for found in (listen, file.http_options.with_absolute_paths()):
        assert found.ssl_certfile == str(certificates / "a.crt")
        assert found.ssl_keyfile == str(certificates / "a.key")


def test_an_endpoint_with_a_certificate_for_another_name_is_found_ready(certificates: Path) -> None:
    class Ready(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates / "a.crt", certificates / "a.key")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Ready) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        tries = 0

        def wait() -> None:
            nonlocal tries
            tries += 1
            assert tries < 20, "it is ready, and not found so"

        _await_ready(f"https://127.0.0.1:{server.server_port}", wait)
        server.shutdown()
