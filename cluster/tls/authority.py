"""A cluster's own certificate authority, and what it signs. Values only; `files` keeps them.

Two kinds of certificate: a *member's* names `PEER_NAME` and is good for both ends of a call inside
the cluster; a *front's* names the hosts that clients type and is good for a server alone, so a
front's stolen key opens no port inside.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from penstock.errors import UsageError
from penstock.peers import PEER_NAME

_BACKDATE = timedelta(minutes=5)
"""Clocks of a cluster's machines differ a little."""
_HOST = re.compile(r"(?:\*\.)?(?=.{1,253}$)[a-z0-9-]{1,63}(?:\.[a-z0-9-]{1,63})*")


@dataclass(frozen=True)
class Pair:
    """A certificate and its private key, both PEM."""

    cert: bytes
    key: bytes


@dataclass(frozen=True)
class About:
    """What a certificate says."""

    subject: str
    hosts: tuple[str, ...]
    until: datetime
    is_authority: bool


def new_authority(days: int) -> Pair:
    """Signs members and fronts, no further authority. EC P-256, as all keys here."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = _name("Penstock cluster authority")
    builder = (
        _builder(name, name, key.public_key(), days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(sign_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    return _pair(builder.sign(key, hashes.SHA256()), key)


def new_member(authority: Pair, days: int) -> Pair:
    """For every process inside; one may serve a whole cluster."""
    both = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    return _issue(authority, PEER_NAME, [x509.DNSName(PEER_NAME)], both, days)


def new_front(authority: Pair, hosts: tuple[str, ...], days: int) -> Pair:
    """For HTTP and the gRPC batch port. Raises `UsageError` for what is no host or address."""
    names = [_general_name(host) for host in hosts]
    if not names:
        raise UsageError("a front's certificate needs a --host: the name that clients type")
    return _issue(authority, hosts[0][:64], names, [ExtendedKeyUsageOID.SERVER_AUTH], days)


def about(cert: bytes) -> About:
    """Raises `UsageError` for bytes that are no certificate."""
    known = _load(cert)
    hosts: list[str] = []
    try:
        names = known.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        hosts += names.get_values_for_type(x509.DNSName)
        hosts += [str(each) for each in names.get_values_for_type(x509.IPAddress)]
    except x509.ExtensionNotFound:
        pass
    try:
        limits = known.extensions.get_extension_for_class(x509.BasicConstraints).value
        signs = limits.ca
    except x509.ExtensionNotFound:
        signs = False
    subject = known.subject.rfc4514_string()
    return About(subject, tuple(hosts), known.not_valid_after_utc, bool(signs))


def _issue(
    authority: Pair,
    subject: str,
    names: list[x509.GeneralName],
    purposes: list[x509.ObjectIdentifier],
    days: int,
) -> Pair:
    issuer = _load(authority.cert)
    signer = serialization.load_pem_private_key(authority.key, password=None)
    if not isinstance(signer, ec.EllipticCurvePrivateKey):
        raise UsageError("the authority's key is no EC key; make one with `penstock certs new`")
    if signer.public_key() != issuer.public_key():
        raise UsageError("ca.crt and ca.key do not belong together; restore the pair")
    key = ec.generate_private_key(ec.SECP256R1())
    builder = (
        _builder(_name(subject), issuer.subject, key.public_key(), days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(sign_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False
        )
    )
    return _pair(builder.sign(signer, hashes.SHA256()), key)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATE)
        .not_valid_after(now + timedelta(days=days))
    )


def _usage(*, sign_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not sign_certificates,
        key_cert_sign=sign_certificates,
        crl_sign=sign_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host.strip("[]")))
    except ValueError:
        if host == PEER_NAME:
            raise UsageError(f"--host {host} is the name of members, not of a front") from None
        if not _HOST.fullmatch(host):
            raise UsageError(
                f"--host {host[:80]!a} is neither a host name in lower case nor an address"
            ) from None
        return x509.DNSName(host)


def _load(cert: bytes) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(cert)
    except ValueError as error:
        raise UsageError("the file holds no certificate in PEM") from error


def _pair(cert: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> Pair:
    pem = serialization.Encoding.PEM
    text = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return Pair(cert.public_bytes(pem), text)
