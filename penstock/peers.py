"""How the processes of one cluster know each other: the `tls` settings.

The certificate proves that a peer was made by the cluster's authority (`penstock certs`), the token
that it belongs to this cluster. On one machine the launcher draws a token for each start and needs
no certificate. `penstock.transport` opens channels and ports with them.
"""

from __future__ import annotations

import re
import ssl
from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from penstock.errors import UsageError
from penstock.settings import Section

PEER_NAME = "cluster.penstock.internal"
"""The name in every member's certificate. Members are called at addresses that no certificate could
foresee (a worker takes a free port of whatever machine it is on), so the name says what a peer is,
not where.
"""
TOKEN_KEY = "penstock-cluster-token"
_TOKEN = re.compile(r"[\x21-\x7e]{16,512}")


class Peers(Section):
    """The `tls` settings: what a process of the cluster shows to others and asks of them."""

    ca: str | None = None
    """File with the certificate (PEM) of the cluster's authority; with `cert` and `key`."""
    cert: str | None = None
    """File with this process's certificate, signed by the authority for `PEER_NAME`."""
    key: str | None = None
    """File with its private key."""
    cluster_token: str | None = Field(default=None, repr=False)
    """Secret that every call between processes of the cluster carries."""
    cluster_token_file: str | None = None
    """The same, read from a file at each process's start."""

    @model_validator(mode="after")
    def _whole(self) -> Self:
        given = [name for name in ("ca", "cert", "key") if getattr(self, name) is not None]
        if given and len(given) < 3:
            raise ValueError(
                f"ca, cert and key go together, but only {' and '.join(given)} is given; "
                "`penstock certs new` makes all three"
            )
        if self.cluster_token is not None and self.cluster_token_file is not None:
            raise ValueError("give cluster_token or cluster_token_file, not both")
        if self.cluster_token is not None and not _TOKEN.fullmatch(self.cluster_token):
            raise ValueError(
                "cluster_token must be 16 to 512 printable ASCII characters without a space"
            )
        return self

    @property
    def secure(self) -> bool:
        """Whether calls are encrypted and certificates asked for."""
        return self.ca is not None

    @property
    def has_token(self) -> bool:
        return self.cluster_token is not None or self.cluster_token_file is not None

    def token(self) -> str | None:
        """Raises `UsageError` for a file that holds none."""
        if self.cluster_token_file is None:
            return self.cluster_token
        text = _read(self.cluster_token_file, "tls.cluster_token_file").decode("latin-1").strip()
        if not _TOKEN.fullmatch(text):
            raise UsageError(
                f"{self.cluster_token_file} holds no cluster token (16 to 512 printable ASCII "
                "characters without a space); `penstock certs new` writes one"
            )
        return text

    def check(self) -> None:
        """Raises `UsageError` unless every file named here can be used."""
        self.token()
        if not self.secure:
            return
        ca, _, _ = self.files()
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=ca.decode("ascii"))
        except (ssl.SSLError, ValueError) as error:
            raise UsageError(f"tls.ca {self.ca} holds no certificate in PEM") from error
        check_pair(str(self.cert), str(self.key), "tls.cert", "tls.key")

    def files(self) -> tuple[bytes, bytes, bytes]:
        """Of the authority's certificate, of ours, and of our key."""
        return (
            _read(str(self.ca), "tls.ca"),
            _read(str(self.cert), "tls.cert"),
            _read(str(self.key), "tls.key"),
        )


ALONE = Peers()
"""Neither certificate nor token: for parts that are used without a cluster."""


def check_pair(cert: str, key: str, cert_name: str, key_name: str) -> None:
    """Raises `UsageError` unless both files can be read and belong together."""
    _read(cert, cert_name)
    _read(key, key_name)
    try:
        # Without a passphrase to give: an encrypted key must fail here, not ask on a terminal.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(cert, key, password=lambda: "")
    except (ssl.SSLError, ValueError) as error:
        raise UsageError(
            f"{cert_name} {cert} and {key_name} {key} are no certificate and unencrypted key (PEM) "
            "that belong together; make a pair with `penstock certs new`"
        ) from error


def _read(path: str, setting: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UsageError(
            f"{setting}: cannot read {path} ({error.strerror}); `penstock certs new` makes the "
            "files of a cluster"
        ) from error
