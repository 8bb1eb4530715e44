"""As much of Kubernetes' API as helm speaks to, in memory and strict: unknown fields are refused,
names collide, immutable fields stay.

Nothing reconciles: an object is what was last written. `fail` breaks the next call of a kind.
"""

from __future__ import annotations

import base64
import copy
import json
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.helm import chart, secret_proto
from tests.helm.chart import Doc
from tests.helm.patches import merge, strategic

# plural -> kind, by API version. Those of the first two lines take strategic patches.
KINDS: dict[str, dict[str, str]] = {
    "v1": {
        "configmaps": "ConfigMap",
        "namespaces": "Namespace",
        "pods": "Pod",
        "secrets": "Secret",
        "serviceaccounts": "ServiceAccount",
        "services": "Service",
    },
    "apps/v1": {"deployments": "Deployment", "statefulsets": "StatefulSet"},
    "networking.k8s.io/v1": {"ingresses": "Ingress", "networkpolicies": "NetworkPolicy"},
    "policy/v1": {"poddisruptionbudgets": "PodDisruptionBudget"},
    "ray.io/v1": {"rayservices": "RayService"},
    "monitoring.coreos.com/v1": {
        "podmonitors": "PodMonitor",
        "prometheusrules": "PrometheusRule",
        "servicemonitors": "ServiceMonitor",
    },
}
_IMMUTABLE = {
    "StatefulSet": ("selector", "serviceName", "podManagementPolicy", "volumeClaimTemplates"),
    "Deployment": ("selector",),
}


class Refused(Exception):
    """An answer that is no success."""

    def __init__(self, code: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.status = {
            "kind": "Status",
            "apiVersion": "v1",
            "status": "Failure",
            "code": code,
            "reason": reason,
            "message": message,
        }
        self.code = code


@dataclass(frozen=True)
class Place:
    """What a path names."""

    api_version: str
    plural: str
    namespace: str
    name: str

    @property
    def kind(self) -> str:
        return KINDS[self.api_version][self.plural]


class ApiServer:
    """One cluster. `address` is for a kubeconfig."""

    def __init__(self) -> None:
        self.objects: dict[tuple[str, str, str], Doc] = {}
        """(kind, namespace, name) -> object."""
        self.calls: list[tuple[str, str]] = []
        """(verb, kind) of every call that wrote."""
        self.pod_phase = "Succeeded"
        """How every pod ends that is watched: there is no kubelet."""
        self._broken: set[str] = set()
        self._lock = threading.Lock()
        self._version = 0
        handler = type("Handler", (_Handler,), {"server_of": self})
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()
        self.address = f"http://127.0.0.1:{self._http.server_port}"

    def kubeconfig(self, folder: Path) -> Path:
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "c", "cluster": {"server": self.address}}],
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
            "current-context": "c",
            "users": [{"name": "u", "user": {}}],
        }
        file = folder / "kubeconfig"
        file.write_text(json.dumps(config))
        return file

    def fail(self, kind: str) -> None:
        """The next write of this kind fails, as a webhook might."""
        self._broken.add(kind)

    def of_release(self) -> dict[tuple[str, str], Doc]:
        """Everything but helm's own records, by kind and name."""
        return {
            (kind, name): obj
            for (kind, _, name), obj in self.objects.items()
            if obj.get("type") != "helm.sh/release.v1"
        }

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def get(self, place: Place) -> Doc:
        try:
            return self.objects[place.kind, place.namespace, place.name]
        except KeyError:
            raise Refused(404, "NotFound", f'{place.plural} "{place.name}" not found') from None

    def listed(self, place: Place, selector: str) -> Doc:
        wanted = dict(part.split("=", 1) for part in selector.split(",") if "=" in part)
        found = [
            obj
            for (kind, namespace, _), obj in self.objects.items()
            if kind == place.kind
            and namespace == place.namespace
            and wanted.items() <= obj["metadata"].get("labels", {}).items()
        ]
        return {
            "kind": f"{place.kind}List",
            "apiVersion": place.api_version,
            "metadata": {"resourceVersion": str(self._version)},
            "items": found,
        }

    def create(self, place: Place, body: Doc) -> Doc:
        with self._lock:
            self._writes("create", place.kind)
            key = (place.kind, place.namespace, body["metadata"]["name"])
            if key in self.objects:
                message = f'{place.plural} "{key[2]}" already exists'
                raise Refused(409, "AlreadyExists", message)
            obj = _admitted(place, body)
            obj["metadata"] |= {
                "namespace": place.namespace,
                "uid": str(uuid.uuid4()),
                "creationTimestamp": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            }
            return self._keep(key, obj)

    def change(self, place: Place, edit: Callable[[Doc], Doc]) -> Doc:
        with self._lock:
            self._writes("update", place.kind)
            before = self.get(place)
            obj = _admitted(place, edit(copy.deepcopy(before)))
            for field in _IMMUTABLE.get(place.kind, ()):
                if obj["spec"].get(field) != before["spec"].get(field):
                    message = f"{place.kind} {place.name}: spec.{field}: field is immutable"
                    raise Refused(422, "Invalid", message)
            return self._keep((place.kind, place.namespace, place.name), obj)

    def delete(self, place: Place) -> Doc:
        with self._lock:
            self._writes("delete", place.kind)
            self.get(place)
            del self.objects[place.kind, place.namespace, place.name]
        return {"kind": "Status", "apiVersion": "v1", "status": "Success"}

    def _writes(self, verb: str, kind: str) -> None:
        self.calls.append((verb, kind))
        if kind in self._broken:
            self._broken.discard(kind)
            raise Refused(500, "InternalError", f"the webhook of {kind} does not answer")

    def _keep(self, key: tuple[str, str, str], obj: Doc) -> Doc:
        self._version += 1
        obj["metadata"]["resourceVersion"] = str(self._version)
        self.objects[key] = obj
        return obj


def _admitted(place: Place, body: Doc) -> Doc:
    """What the server keeps of it. Raises `Refused` for what it would not take."""
    obj = copy.deepcopy(body)
    obj.setdefault("apiVersion", place.api_version)
    obj.setdefault("kind", place.kind)
    if (obj["apiVersion"], obj["kind"]) != (place.api_version, place.kind):
        raise Refused(400, "BadRequest", f"{obj['kind']} does not belong at {place.plural}")
    if place.api_version not in chart.FOREIGN:
        try:
            chart.validate(obj, "1.33")
        except AssertionError as error:
            raise Refused(422, "Invalid", str(error)) from None
    for key, value in obj.pop("stringData", {}).items():
        obj.setdefault("data", {})[key] = base64.b64encode(value.encode()).decode()
    return obj


class _Handler(BaseHTTPRequestHandler):
    server_of: ApiServer
    protocol_version = "HTTP/1.1"
    # Else each answer waits for the acknowledgement of its headers.
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(lambda: self.server_of.create(self._place(), self._body()), 201)

    def do_PUT(self) -> None:
        body = self._body()
        self._answer(lambda: self.server_of.change(self._place(), lambda _: body))

    def do_PATCH(self) -> None:
        body, kind = self._body(), self.headers["Content-Type"]
        apply = {
            "application/merge-patch+json": merge,
            "application/strategic-merge-patch+json": strategic,
        }[kind]
        self._answer(lambda: self.server_of.change(self._place(), lambda old: apply(old, body)))

    def do_DELETE(self) -> None:
        # Its options are not ours to honour.
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self._answer(lambda: self.server_of.delete(self._place()))

    def _get(self) -> Doc:
        path = urlsplit(self.path).path.strip("/")
        if path == "version":
            return {"major": "1", "minor": "33", "gitVersion": "v1.33.0"}
        if path == "api":
            return {"kind": "APIVersions", "versions": ["v1"]}
        if path == "apis":
            return {"kind": "APIGroupList", "apiVersion": "v1", "groups": _groups()}
        version = path.removeprefix("apis/").removeprefix("api/")
        if version in KINDS:
            return _resources(version)
        if path.startswith("openapi/v3"):
            return _openapi(path.removeprefix("openapi/v3").strip("/"))
        place = self._place()
        if place.name:
            return self.server_of.get(place)
        query = parse_qs(urlsplit(self.path).query)
        return self.server_of.listed(place, query.get("labelSelector", [""])[0])

    def _place(self) -> Place:
        parts = urlsplit(self.path).path.strip("/").split("/")
        version = "v1" if parts[0] == "api" else "/".join(parts[1:3])
        rest = parts[2:] if parts[0] == "api" else parts[3:]
        namespace = ""
        if rest[:1] == ["namespaces"] and len(rest) > 2:
            namespace, rest = rest[1], rest[2:]
        if not rest or rest[0] not in KINDS.get(version, {}):
            raise Refused(404, "NotFound", "the server could not find the requested resource")
        return Place(version, rest[0], namespace, rest[1] if len(rest) > 1 else "")

    def _body(self) -> Doc:
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if raw.startswith(secret_proto.MAGIC):
            return secret_proto.secret_of(raw)
        return dict(json.loads(raw)) if raw else {}

    def _answer(self, work: Callable[[], Doc], code: int = 200) -> None:
        query = parse_qs(urlsplit(self.path).query)
        if self.command == "GET" and query.get("watch"):
            self._watch()
            return
        try:
            content = work()
        except Refused as refused:
            content, code = refused.status, refused.code
        raw = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def _watch(self) -> None:
        """The objects as they are, pods at their end: then the stream ends too."""
        query = parse_qs(urlsplit(self.path).query)
        name = query.get("fieldSelector", [""])[0].removeprefix("metadata.name=")
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Connection", "close")
        self.end_headers()
        for obj in self.server_of.listed(self._place(), "")["items"]:
            if name in ("", obj["metadata"]["name"]):
                ended = {**obj, "status": {"phase": self.server_of.pod_phase}}
                event = {"type": "MODIFIED", "object": ended}
                self.wfile.write(json.dumps(event).encode() + b"\n")
        self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        pass


def _openapi(group: str) -> Doc:
    """As much as tells a client that this server refuses unknown fields itself."""
    if not group:
        urls = [("apis/" if "/" in version else "api/") + version for version in KINDS]
        return {"paths": {url: {"serverRelativeURL": f"/openapi/v3/{url}"} for url in urls}}
    version = group.removeprefix("apis/").removeprefix("api/")
    name, _, number = version.rpartition("/")
    strict = {"name": "fieldValidation", "in": "query"}
    return {
        "openapi": "3.0.0",
        "paths": {
            f"/{group}/namespaces/{{namespace}}/{plural}/{{name}}": {
                "patch": {
                    "parameters": [strict],
                    "x-kubernetes-group-version-kind": {
                        "group": name,
                        "version": number,
                        "kind": kind,
                    },
                }
            }
            for plural, kind in KINDS[version].items()
        },
    }


def _groups() -> list[Doc]:
    groups = []
    for version in KINDS:
        name, slash, number = version.partition("/")
        if slash:
            known = {"groupVersion": version, "version": number}
            groups.append({"name": name, "versions": [known], "preferredVersion": known})
    return groups


def _resources(version: str) -> Doc:
    verbs = ["create", "delete", "get", "list", "patch", "update", "watch"]
    resources: list[dict[str, Any]] = [
        {
            "name": plural,
            "singularName": kind.lower(),
            "namespaced": kind != "Namespace",
            "kind": kind,
            "verbs": verbs,
        }
        for plural, kind in KINDS[version].items()
    ]
    return {"kind": "APIResourceList", "groupVersion": version, "resources": resources}
