"""A wrong value fails before anything is installed, with the field's name."""

from __future__ import annotations

import functools

import pytest

from tests.helm import chart

# What is wrong -> what helm's validator says of it, up to its reason.
WRONG = {
    'batch.journal_url="redis://user:password@x:6379"': "batch.journal_url",
    'telemetry.log_level="loud"': "telemetry.log_level",
    "telemetry.metrics_port=9": "telemetry: Additional property metrics_port",
    "prefil={}": "(root): Additional property prefil",
    "serviceAccountAnnotations.a=1": "serviceAccountAnnotations.a",
    'image.repository=""': "image.repository",
    'image.tag="a b"': "image.tag",
    'image.digest="sha256:12"': "image.digest",
    'image.pullPolicy="Sometimes"': "image.pullPolicy",
    'image.pullSecrets="one"': "image.pullSecrets",
    'model.device="tpu"': "model.device",
    'model.name=""': "model.name",
    'model.source.type="ftp"': "model.source.type",
    'model.source.digest="md5:00"': "model.source.digest",
    'model.source.path="../etc"': "model.source.path",
    'model.config.kv_cache_dtype="int4"': "model.config.kv_cache_dtype",
    'model.config.numerics="exactly"': "model.config.numerics",
    "model.config.max_model_len=3": "model.config.max_model_len",
    "model.config.draft_confidence=1.5": "model.config.draft_confidence",
    'model.config.device="cpu"': "model.config: Additional property device",
    "parallel.tensor=0": "parallel.tensor",
    "parallel.tp=2": "parallel: Additional property tp",
    "head.replicas=2": "head.replicas",
    "prefill.replicas=0": "prefill.replicas",
    'prefill.replicas="two"': "prefill.replicas",
    "prefill.config.chunk_tokens=8": "prefill.config.chunk_tokens",
    "prefill.config.chunk=2048": "prefill.config: Additional property chunk",
    'prefill.resources.limits.memory="2 GB"': "prefill.resources.limits.memory",
    'prefill.shmSize="1GB"': "prefill.shmSize",
    "prefill.startupSeconds=1": "prefill.startupSeconds",
    'prefill.gpu.resource="gpu"': "prefill.gpu.resource",
    "decode.config.max_running=0": "decode.config.max_running",
    'decode.config.kv_memory_bytes="1 lot"': "decode.config.kv_memory_bytes",
    "decode.maxUnavailable=0": "decode.maxUnavailable",
    'front.config.api_key="sk-1"': "front.config: Additional property api_key",
    'front.config.host="0.0.0.0"': "front.config: Additional property host",
    "front.config.max_streams=-1": "front.config.max_streams",
    'front.service.type="Anything"': "front.service.type",
    "front.service.grpcPort=70000": "front.service.grpcPort",
    "front.service.port=70000": "front.service.port",
    'front.extraEnv=[{"name":"1X","value":""}]': "front.extraEnv.0.name",
    "kvstore.replicas=3": "kvstore.replicas",
    "kvstore.config.chunk_bytes=10": "kvstore.config.chunk_bytes",
    'kvstore.disk.size="500GB"': "kvstore.disk.size",
    'kvstore.disk.storageClass="Fast SSD"': "kvstore.disk.storageClass",
    'kvstore.disk.whenDeleted="Keep"': "kvstore.disk.whenDeleted",
    'kvstore.disk.path="/data"': "kvstore.disk: Additional property path",
    'kvstore.config.disk_bytes="1GiB"': "kvstore.config: Additional property disk_bytes",
    'kvstore.config.redis_url="redis://x"': "kvstore.config: Additional property redis_url",
    'redis.bundled.maxMemory="1Gb"': "redis.bundled.maxMemory",
    'redis.external.url="http://x"': "redis.external.url",
    'redis.external.url="redis://user:password@x:1"': "redis.external.url",
    'ray.version="2.x"': "ray.version",
    "ray.drainSeconds=-1": "ray.drainSeconds",
    'ray.upgrade.strategy="Recreate"': "ray.upgrade.strategy",
    'ray.objectStoreMemory="lots"': "ray.objectStoreMemory",
    'httpRoute.timeout="an hour"': "httpRoute.timeout",
    "networkPolicy.operatorNamespace=1": "networkPolicy.operatorNamespace",
    'monitoring.interval="often"': "monitoring.interval",
    'test.timeoutSeconds="soon"': "test.timeoutSeconds",
}
# Two values that do not go together, or one that wants another -> the name that the chart says.
TOGETHER = {
    'image.tag="latest"': "image.tag",
    'model.name="gpt"': "model.name",
    'model.source.type="pvc"': "model.source.claimName",
    'model.source={"type":"hub","uri":"a/b"}': "model.source.digest",
    'front.auth={"existingSecret":"a","keysFileSecret":"b"}': "front.auth",
    'redis.external.existingSecret="x"': "redis.bundled.enabled",
    'tls={"existingSecret":"a","certManager":{"enabled":true,"issuerRef":{"name":"i"}}}': "tls",
    "tls.certManager.enabled=true": "tls.certManager.issuerRef",
    "ray.gcsFaultTolerance.enabled=true": "ray.gcsFaultTolerance.redisAddress",
    "ingress.enabled=true": "ingress.host",
    "httpRoute.enabled=true": "httpRoute.parentRefs",
}


@functools.cache
def said() -> tuple[str, ...]:
    """Every line of complaint about all of `WRONG`. Helm names all faults at once; assignments to
    one place go into different calls.
    """
    batches: list[dict[str, str]] = []
    for wrong in WRONG:
        place = wrong.partition("=")[0]
        for batch in batches:
            if not any(place.startswith(p) or p.startswith(place) for p in batch):
                batch[place] = wrong
                break
        else:
            batches.append({place: wrong})
    lines = [line for batch in batches for line in chart.refusal(*batch.values()).splitlines()]
    print(f"{len(WRONG)} wrong values in {len(batches)} calls")
    return tuple(line.removeprefix("- ") for line in lines if line.startswith("- "))


@pytest.mark.parametrize(("wrong", "name"), WRONG.items())
def test_a_wrong_value_is_refused_by_name(wrong: str, name: str) -> None:
    mine = [line for line in said() if line.startswith((f"{name}:", f"{name} "))]
    print(mine)
    assert mine, said()


@pytest.mark.parametrize(("wrong", "name"), TOGETHER.items())
def test_values_that_do_not_go_together_are_refused_by_name(wrong: str, name: str) -> None:
    text = chart.refusal(wrong)
    print(text)
    assert f"{name}: " in text


def test_enough_is_tried_and_nothing_right_is_refused() -> None:
    assert len(WRONG) + len(TOGETHER) >= 30
    # As many complaints as wrong values: none of them is about something else.
    assert len(said()) <= len(WRONG) + 5, said()
