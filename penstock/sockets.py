"""TLS of plain sockets between members of the cluster, as `penstock.transport` has it for gRPC:
both sides show a certificate of the cluster's authority, made for `PEER_NAME`.
"""

from __future__ import annotations

import ssl

from penstock.errors import UsageError
from penstock.peers import Peers


def server_context(peers: Peers) -> ssl.SSLContext | None:
    """For the side that listens; None without certificates. Raises `UsageError` for its files."""
    return _context(peers, ssl.PROTOCOL_TLS_SERVER) if peers.secure else None


def client_context(peers: Peers) -> ssl.SSLContext | None:
    """For the side that connects, which names `PEER_NAME` as the server it expects."""
    return _context(peers, ssl.PROTOCOL_TLS_CLIENT) if peers.secure else None


def _context(peers: Peers, protocol: int) -> ssl.SSLContext:
    ca, _, _ = peers.files()
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    try:
        context.load_verify_locations(cadata=ca.decode("ascii"))
        context.load_cert_chain(str(peers.cert), str(peers.key), password=lambda: "")
    except (ssl.SSLError, ValueError) as error:
        raise UsageError(
            "tls.ca, tls.cert and tls.key are no certificates and key (PEM) that belong together; "
            "make them with `penstock certs new`"
        ) from error
    return context
