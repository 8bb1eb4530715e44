"""Starts on this machine what the rendered chart would start in a cluster: the kubelet's part and
KubeRay's, for one machine.

Commands, environment, files and settings are the chart's own. What must differ on one machine is
mapped and nothing else: paths of mounts to a folder, names of Services to loopback, ports to free
ones, and Ray's ports and folder, of which a pod has its own.
"""

from __future__ import annotations

import base64
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import yaml
from ray.util import get_node_ip_address

from cluster.launchers.common import free_port
from tests.cluster.breakage import command_line, marked
from tests.helm import chart
from tests.helm.chart import Doc

_BIN = Path(sys.executable).parent
_LOOPBACK = "127.0.0.1"
# What KubeRay 1.6 sets on every Ray container of a RayService.
_KUBERAY_ENV = {
    "RAY_timeout_ms_task_wait_for_death_info": "0",
    "RAY_gcs_server_request_timeout_seconds": "5",
    "RAY_SERVE_KV_TIMEOUT_S": "5",
    "RAY_USAGE_STATS_KUBERAY_IN_USE": "1",
}


class Machine:
    """One release, started here. `close` ends every process that it started, whatever happened."""

    def __init__(self, docs: Sequence[Doc], folder: Path) -> None:
        self.docs = docs
        self._root = folder
        # Of every pod. Ray takes no loopback address for a node that is joined by RAY_ADDRESS.
        self.ip = str(get_node_ip_address())
        self._ray = Path(tempfile.mkdtemp(prefix="pk", dir="/tmp"))
        self._mark = f"PENSTOCK_TRIAL={uuid.uuid4().hex}"
        self._processes: dict[str, subprocess.Popen[str]] = {}
        self._agents: dict[str, int] = {}
        self.secrets = {
            doc["metadata"]["name"]: {
                **(doc.get("stringData") or {}),
                **{k: base64.b64decode(v).decode() for k, v in (doc.get("data") or {}).items()},
            }
            for doc in docs
            if doc["kind"] == "Secret"
        }
        self._config_maps = {
            doc["metadata"]["name"]: doc["data"] for doc in docs if doc["kind"] == "ConfigMap"
        }
        names = {
            component: chart.one(docs, "Service", f"-{component}")["metadata"]["name"]
            for component in ("front", "kvstore", "redis")
            if component != "redis" or any(d["kind"] == "Deployment" for d in docs)
        }
        self.ports = {component: free_port() for component in names}
        self._hosts = {
            rf"([\w-]+\.)?{re.escape(name)}\.space\.svc:\d+": f"{_LOOPBACK}:{self.ports[component]}"
            for component, name in names.items()
        }
        self.gcs, self.dashboard = free_port(), free_port()

    # -- the kubelet's part

    def mounts(self, pod_name: str, pod: Doc) -> dict[str, str]:
        """Makes the pod's files; mount path -> path here. Files that several pods share are the
        same for all, because one setting names them for all; empty folders are a pod's own, and
        what is no volume of the pod is a claim, which outlives it.
        """
        found: dict[str, str] = {}
        volumes = {v["name"]: v for v in pod["spec"].get("volumes", [])}
        for container in pod["spec"]["containers"]:
            for mount in container.get("volumeMounts", []):
                path, volume = mount["mountPath"], volumes.get(mount["name"])
                if path == "/dev/shm":
                    continue
                if volume is None:
                    own, volume = f"claims/{mount['name']}-{pod_name}", {}
                else:
                    own = f"pods/{pod_name}" if "emptyDir" in volume else "shared"
                here = self._root / own / path.lstrip("/")
                here.mkdir(parents=True, exist_ok=True)
                for name, content in self._files(volume).items():
                    (here / name).write_text(content)
                found[path] = str(here)
        return found

    def _files(self, volume: Doc) -> dict[str, str]:
        if "configMap" in volume:
            return dict(self._config_maps[volume["configMap"]["name"]])
        sources = volume.get("projected", {}).get("sources", [])
        if "secret" in volume:
            sources = [{"secret": {**volume["secret"], "name": volume["secret"]["secretName"]}}]
        found = {}
        for source in sources:
            secret = self.secrets[source["secret"]["name"]]
            for item in source["secret"]["items"]:
                found[item["path"]] = secret[item["key"]]
        return found

    def environment(
        self, pod_name: str, container: Doc, mounts: Mapping[str, str]
    ) -> dict[str, str]:
        """Of the container alone: nothing of this machine's but PATH."""
        env = {"PATH": f"{_BIN}:{os.environ['PATH']}"}
        for variable in container.get("env", []):
            source = variable.get("valueFrom", {})
            if "secretKeyRef" in source:
                ref = source["secretKeyRef"]
                value = self.secrets[ref["name"]][ref["key"]]
            elif "fieldRef" in source:
                value = {"metadata.name": pod_name, "status.podIP": self.ip}[
                    source["fieldRef"]["fieldPath"]
                ]
            else:
                value = variable["value"]
            env[variable["name"]] = self.here(value, mounts)
        mark, _, value = self._mark.partition("=")
        return {**env, mark: value}

    def here(self, text: str, mounts: Mapping[str, str]) -> str:
        """`text` with what is elsewhere in a pod or a cluster."""
        if mounts:
            # In one pass: what a path became may hold another mount's path.
            paths = "|".join(re.escape(path) for path in sorted(mounts, key=len, reverse=True))
            text = re.sub(rf"(?<![\w./-])({paths})(?![\w.-])", lambda m: mounts[m[1]], text)
        for pattern, address in self._hosts.items():
            text = re.sub(pattern, address, text)
        return text

    def command(
        self, container: Doc, env: Mapping[str, str], mounts: Mapping[str, str]
    ) -> list[str]:
        words = [*container["command"], *container.get("args", [])]
        expanded = [re.sub(r"\$\((\w+)\)", lambda m: env[m[1]], str(word)) for word in words]
        return [self.here(word, mounts) for word in expanded]

    def run(self, name: str, command: Sequence[str], env: Mapping[str, str]) -> None:
        log = (self._root / f"{name}.log").open("w")
        self._processes[name] = subprocess.Popen(
            list(command),
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def start_pod(
        self, name: str, pod: Doc, edit: Callable[[str], str] = lambda word: word
    ) -> None:
        """A pod of one container. `edit`: further mapping of its words."""
        mounts = self.mounts(name, pod)
        (container,) = pod["spec"]["containers"]
        env = self.environment(name, container, mounts)
        for path in mounts.values():
            self._map_inside(Path(path), mounts, edit)
        self.run(name, [edit(word) for word in self.command(container, env, mounts)], env)

    def _map_inside(
        self, folder: Path, mounts: Mapping[str, str], edit: Callable[[str], str]
    ) -> None:
        for file in folder.glob("*.yaml"):
            shared = {path: here for path, here in mounts.items() if "/pods/" not in here}
            # Pods have ports of their own; here a fixed one may be another's.
            word = self.here(file.read_text(), shared).replace("0.0.0.0:7071", "127.0.0.1:0")
            file.write_text(edit(word))

    def kill(self, name: str) -> None:
        """At once, with what it started."""
        process = self._processes.pop(name)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(5)

    # -- KubeRay's part

    def start_ray(self, group: str) -> None:
        """A pod of a Ray group, by the command that KubeRay makes of `rayStartParams`."""
        spec = chart.group(self.docs, group)
        name = f"ray-{group}"
        mounts = self.mounts(name, spec["template"])
        (container,) = spec["template"]["spec"]["containers"]
        env = {**self.environment(name, container, mounts), **_KUBERAY_ENV}
        env["RAY_ADDRESS"] = f"{self.ip}:{self.gcs}"
        env |= self.token()
        # One setting names the file for all pods, and each pod has its own /tmp.
        env["PENSTOCK_LAUNCHER__READY_FILE"] = self.ready_file(group)
        # Compiled once for this machine, not once a pod.
        env["XDG_CACHE_HOME"] = os.environ.get("XDG_CACHE_HOME") or str(
            Path("~/.cache").expanduser()
        )
        head = group == "head"
        params = dict(spec["rayStartParams"])
        params["block"] = "true"
        params["memory"] = str(_bytes(container["resources"]["limits"]["memory"]))
        params["metrics-export-port"] = str(free_port())
        self._agents[name] = free_port()
        params["dashboard-agent-listen-port"] = str(self._agents[name])
        params["node-ip-address"] = self.ip
        # As each pod has a /tmp/ray of its own. Ray's sockets want short paths.
        params["temp-dir"] = str(self._ray / group)
        if head:
            params |= {"port": str(self.gcs), "dashboard-port": str(self.dashboard)}
            params |= {"dashboard-host": self.ip, "ray-client-server-port": str(free_port())}
        else:
            params["address"] = f"{self.ip}:{self.gcs}"
        flags = [
            f"--{k}" if v == "true" else f"--{k}={v}"
            for k, v in sorted(params.items())
            if v != "false"
        ]
        start = f"ulimit -n 65536; ray start {'--head ' if head else ''}{' '.join(flags)}"
        self.run(name, ["/bin/bash", "-c", "--", start], env)

    def ready_file(self, group: str) -> str:
        return str(self._root / f"pods/ray-{group}/tmp/penstock/ready")

    def token(self) -> dict[str, str]:
        """What KubeRay makes of `authOptions`."""
        auth = chart.one(self.docs, "RayService")["spec"]["rayClusterConfig"]["authOptions"]
        if auth["mode"] == "disabled":
            return {"RAY_AUTH_MODE": "disabled"}
        token = self.secrets[auth["secretName"]]["auth_token"]
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}

    def deploy(self) -> None:
        """Puts `serveConfigV2` to the dashboard, as the operator does, again until it is taken."""
        config = yaml.safe_load(
            self.here(
                chart.one(self.docs, "RayService")["spec"]["serveConfigV2"], self._shared_mounts()
            )
        )
        config["http_options"]["host"] = _LOOPBACK
        config["http_options"]["port"] = self.ports["front"]
        deadline = time.monotonic() + 60
        while True:
            answer = httpx.put(
                f"http://{self.ip}:{self.dashboard}/api/serve/applications/",
                json=config,
                headers={"x-ray-authorization": f"Bearer {self.token().get('RAY_AUTH_TOKEN', '')}"},
                timeout=60,
            )
            if answer.status_code == 200:
                return
            assert time.monotonic() < deadline, answer.text
            time.sleep(1)

    def applications(self) -> dict[str, Any]:
        answer = httpx.get(
            f"http://{self.ip}:{self.dashboard}/api/serve/applications/",
            headers={"x-ray-authorization": f"Bearer {self.token().get('RAY_AUTH_TOKEN', '')}"},
            timeout=10,
        )
        return dict(answer.json()["applications"])

    def _shared_mounts(self) -> dict[str, str]:
        return {
            path: here
            for path, here in self.mounts(
                "ray-head", chart.group(self.docs, "head")["template"]
            ).items()
            if "/shared/" in here
        }

    # -- looking, ending

    def logs(self) -> str:
        """The end of what every process said."""
        return "\n".join(
            f"== {log.stem}\n{log.read_text()[-2000:]}" for log in self._root.glob("*.log")
        )

    def command_lines(self) -> list[str]:
        """Of every process of the release."""
        return [command_line(pid) for pid in marked(self._mark)]

    def probe(self, group: str, probe: Doc) -> str:
        """Runs it once as the kubelet would. Fails with what it said."""
        if "exec" in probe:
            done = self.exec_in(group, probe["exec"]["command"])
            assert done.returncode == 0, done.stderr
            return f"exec {done.returncode}"
        get = probe["httpGet"]
        name = f"ray-{group}"
        port = {52365: self._agents.get(name), 8265: self.dashboard, 8000: self.ports["front"]}[
            get["port"]
        ]
        host = _LOOPBACK if get["port"] == 8000 else self.ip
        answer = httpx.get(f"http://{host}:{port}{get['path']}", timeout=probe["timeoutSeconds"])
        assert answer.status_code == 200, answer.text
        return f"GET {get['path']} {answer.status_code}"

    def run_to_end(
        self, name: str, pod: Doc, *, timeout_s: float
    ) -> subprocess.CompletedProcess[str]:
        mounts = self.mounts(name, pod)
        (container,) = pod["spec"]["containers"]
        env = self.environment(name, container, mounts)
        return subprocess.run(
            self.command(container, env, mounts),
            env=env,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def exec_in(self, group: str, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        """What the kubelet runs in a Ray pod: a probe, a preStop."""
        spec = chart.group(self.docs, group)["template"]
        name = f"ray-{group}"
        mounts = self.mounts(name, spec)
        (container,) = spec["spec"]["containers"]
        env = {**self.environment(name, container, mounts), **self.token()}
        env["RAY_ADDRESS"] = f"{self.ip}:{self.gcs}"
        words = [self.here(word, mounts) for word in command]
        return subprocess.run(
            words, env=env, capture_output=True, text=True, timeout=120, check=False
        )

    def close(self) -> None:
        for process in self._processes.values():
            # A server may overwrite the environment by which others are found.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        deadline = time.monotonic() + 20
        while (left := set(marked(self._mark))) and time.monotonic() < deadline:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)
        for process in self._processes.values():
            process.wait(5)
        shutil.rmtree(self._ray, ignore_errors=True)


def _bytes(quantity: str) -> int:
    return int(quantity[:-2]) * {"Mi": 1 << 20, "Gi": 1 << 30}[quantity[-2:]]
