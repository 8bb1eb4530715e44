{{/* Bytes of 100Mi, which Ray's own flags do not know: argument is the quantity. */}}
{{- define "penstock.bytes" -}}
{{- $n := regexFind "^[0-9]+" . | int64 -}}
{{- $unit := regexFind "[KMGT]" . -}}
{{- mul $n (get (dict "K" 1024 "M" 1048576 "G" 1073741824 "T" 1099511627776) $unit) -}}
{{- end -}}

{{/* rayStartParams of a group that offers `units` of its own resource: root, role's name. */}}
{{- define "penstock.rayStartParams" -}}
{{- $root := index . 0 -}}{{- $role := index . 1 -}}
object-store-memory: {{ include "penstock.bytes" $root.Values.ray.objectStoreMemory | quote }}
{{- if eq $role "head" }}
# Nothing of ours is placed on the head.
num-cpus: "0"
dashboard-host: 0.0.0.0
{{- else }}
{{- $ranks := ternary "1" (include "penstock.ranks" (list $root $role)) (eq $role "front") }}
# Counted, not measured: one a rank. The resource of this name keeps other pools off these pods.
num-cpus: {{ $ranks | quote }}
resources: {{ printf "'{\"penstock_%s\": %s}'" $role $ranks | quote }}
{{- if and (ne $role "front") (eq $root.Values.model.device "cuda") }}
num-gpus: {{ $ranks | quote }}
{{- end }}
{{- end }}
{{- end -}}

{{/* The pod of a Ray group: root, role's name. */}}
{{- define "penstock.rayPod" -}}
{{- $root := index . 0 -}}{{- $name := index . 1 -}}
{{- $role := index $root.Values $name -}}
{{- $worker := or (eq $name "prefill") (eq $name "decode") -}}
{{- $cuda := and $worker (eq $root.Values.model.device "cuda") -}}
{{- $fetched := and (ne $name "head") (ne $root.Values.model.source.type "shipped") -}}
metadata:
  labels:
    {{- include "penstock.labels" $root | nindent 4 }}
    app.kubernetes.io/component: {{ $name }}
    {{- with $role.podLabels }}{{ toYaml . | nindent 4 }}{{ end }}
  {{- with $role.podAnnotations }}
  annotations: {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  serviceAccountName: {{ include "penstock.fullname" $root }}
  automountServiceAccountToken: false
  # Variables such as PENSTOCK_KVSTORE_PORT of other Services would read like settings.
  enableServiceLinks: false
  terminationGracePeriodSeconds: {{ add $root.Values.ray.drainSeconds 30 }}
  securityContext: {{- include "penstock.podSecurity" $root | nindent 4 }}
  {{- with $root.Values.image.pullSecrets }}
  imagePullSecrets:
    {{- range . }}
    - name: {{ . }}
    {{- end }}
  {{- end }}
  {{- include "penstock.placement" (list $root $role $name) | nindent 2 }}
  {{- if $fetched }}
  {{- include "penstock.modelInit" (list $root $name) | nindent 2 }}
  {{- end }}
  containers:
    - name: ray-{{ ternary "head" "worker" (eq $name "head") }}
      image: {{ include "penstock.image" $root | quote }}
      imagePullPolicy: {{ $root.Values.image.pullPolicy }}
      securityContext: {{- include "penstock.containerSecurity" $root | nindent 8 }}
      env: {{- include "penstock.rayEnv" (list $root $name) | nindent 8 }}
      resources: {{- include "penstock.rayResources" (list $root $name $cuda) | nindent 8 }}
      {{- if eq $name "head" }}
      ports:
        - {name: gcs-server, containerPort: 6379}
        - {name: dashboard, containerPort: 8265}
        - {name: client, containerPort: 10001}
        # KubeRay wants the name on the head to make its own Service.
        - {name: serve, containerPort: 8000}
        - {name: metrics, containerPort: 8080}
      {{- else }}
      ports:
        - {name: serve, containerPort: 8000}
        - {name: metrics, containerPort: 8080}
        {{- if and (eq $name "front") $root.Values.front.service.grpcPort }}
        - {name: grpc, containerPort: 9000}
        {{- end }}
      {{- end }}
      {{- include "penstock.rayProbes" (list $root $name) | nindent 6 }}
      lifecycle:
        preStop:
          exec:
            command: [python, -m, cluster.drain, --ready-file, /tmp/penstock/ready, --timeout, {{ $root.Values.ray.drainSeconds | quote }}]
      volumeMounts:
        - {name: tmp, mountPath: /tmp}
        - {name: shared-mem, mountPath: /dev/shm}
        {{- if $fetched }}
        - {name: model, mountPath: /models, readOnly: true}
        {{- end }}
        {{- include "penstock.secretMounts" (list $root $name) | nindent 8 }}
  volumes:
    # Ray's sessions and logs, compiled kernels.
    - {name: tmp, emptyDir: {sizeLimit: 2Gi}}
    # KubeRay's name for it; else it adds one as large as the pod's memory.
    - {name: shared-mem, emptyDir: {medium: Memory, sizeLimit: {{ $role.shmSize }}}}
    {{- if $fetched }}
    {{- include "penstock.modelVolume" $root | nindent 4 }}
    {{- end }}
    {{- include "penstock.secretVolumes" (list $root $name) | nindent 4 }}
{{- end -}}

{{- define "penstock.rayEnv" -}}
{{- $root := index . 0 -}}{{- $name := index . 1 -}}
- {name: HOME, value: /tmp}
- {name: RAY_USAGE_STATS_ENABLED, value: "0"}
# Where this pod's worker listens: its own address and no other.
- name: PENSTOCK_LAUNCHER__WORKER_HOST
  valueFrom: {fieldRef: {fieldPath: status.podIP}}
{{ include "penstock.redisUrlEnv" $root }}
{{- if eq $name "front" }}
{{- if $root.Values.front.service.grpcPort }}
# Where the gRPC batch service listens.
- name: PENSTOCK_FRONT__HOST
  valueFrom: {fieldRef: {fieldPath: status.podIP}}
{{- end }}
- name: PENSTOCK_FRONT__CLUSTER_KEY
  valueFrom: {secretKeyRef: {name: {{ include "penstock.secretName" $root }}, key: cluster-key}}
{{- if and $root.Values.front.auth.enabled (not $root.Values.front.auth.keysFileSecret) }}
- name: PENSTOCK_FRONT__API_KEY
  valueFrom: {secretKeyRef: {name: {{ include "penstock.apiKeySecret" $root }}, key: api-key}}
{{- end }}
{{- end }}
{{- with (index $root.Values $name).extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "penstock.rayResources" -}}
{{- $root := index . 0 -}}{{- $name := index . 1 -}}{{- $cuda := index . 2 -}}
{{- $role := index $root.Values $name -}}
{{- $resources := deepCopy $role.resources -}}
{{- if $cuda -}}
{{- $ranks := include "penstock.ranks" (list $root $name) -}}
{{- range $part := list "requests" "limits" -}}
{{- $_ := set (index $resources $part) $role.gpu.resource $ranks -}}
{{- end -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end -}}

{{/* Startup: until weights are loaded. Readiness: may be asked. Liveness: Ray's own process. */}}
{{- define "penstock.rayProbes" -}}
{{- $root := index . 0 -}}{{- $name := index . 1 -}}
{{- $role := index $root.Values $name -}}
{{- $raylet := "httpGet: {path: /api/local_raylet_healthz, port: 52365}" -}}
{{- $serves := "exec: {command: [sh, -c, 'read -r pid node < /tmp/penstock/ready && kill -0 \"$pid\"']}" -}}
startupProbe:
  {{ ternary $serves $raylet (or (eq $name "prefill") (eq $name "decode")) }}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: {{ div (add $role.startupSeconds 4) 5 }}
livenessProbe:
  {{ $raylet }}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 12
readinessProbe:
  {{- if eq $name "head" }}
  httpGet: {path: /api/gcs_healthz, port: 8265}
  {{- else if eq $name "front" }}
  httpGet: {path: /ready, port: 8000, scheme: {{ ternary "HTTPS" "HTTP" (ne $root.Values.front.tls.existingSecret "") }}}
  {{- else }}
  {{ $serves }}
  {{- end }}
  periodSeconds: 5
  timeoutSeconds: 6
  failureThreshold: 2
{{- end -}}

{{/* Files from Secrets: mounts and volumes have the same conditions in the same order. */}}
{{- define "penstock.secretMounts" -}}
{{- $root := index . 0 -}}{{- $name := index . 1 -}}
- {name: tls, mountPath: /etc/penstock/tls, readOnly: true}
{{- if $root.Values.redis.external.existingSecret }}
- {name: redis, mountPath: /etc/penstock/redis, readOnly: true}
{{- end }}
{{- if and (eq $name "front") $root.Values.front.auth.keysFileSecret }}
- {name: api-keys, mountPath: /etc/penstock/keys, readOnly: true}
{{- end }}
{{- if and (ne $name "kvstore") $root.Values.front.tls.existingSecret }}
- {name: front-tls, mountPath: /etc/penstock/front-tls, readOnly: true}
{{- end }}
{{- end -}}

{{- define "penstock.secretVolumes" -}}
{{- $root := index . 0 -}}{{- $name := index . 1 -}}
- name: tls
  projected:
    defaultMode: 0440
    sources:
      - secret:
          name: {{ include "penstock.tlsSecret" $root }}
          items: [{key: ca.crt, path: ca.crt}, {key: tls.crt, path: tls.crt}, {key: tls.key, path: tls.key}]
      - secret:
          name: {{ $root.Values.tls.tokenSecret | default (include "penstock.secretName" $root) }}
          items: [{key: cluster-token, path: cluster-token}]
{{- if $root.Values.redis.external.existingSecret }}
- name: redis
  secret:
    secretName: {{ $root.Values.redis.external.existingSecret }}
    items: [{key: ca.crt, path: ca.crt}]
    optional: true
{{- end }}
{{- if and (eq $name "front") $root.Values.front.auth.keysFileSecret }}
- name: api-keys
  secret: {secretName: {{ $root.Values.front.auth.keysFileSecret }}, items: [{key: keys.yaml, path: keys.yaml}]}
{{- end }}
{{- if and (ne $name "kvstore") $root.Values.front.tls.existingSecret }}
- name: front-tls
  secret: {secretName: {{ $root.Values.front.tls.existingSecret }}}
{{- end }}
{{- end -}}
