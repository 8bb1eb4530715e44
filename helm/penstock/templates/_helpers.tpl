{{- define "penstock.name" -}}
{{- .Values.nameOverride | default .Chart.Name | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{/* At most 40 characters: KubeRay adds up to 20 of its own and pods' names end at 63. */}}
{{- define "penstock.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else if contains (include "penstock.name" .) .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "penstock.name" .) | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "penstock.selector" -}}
app.kubernetes.io/name: {{ include "penstock.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "penstock.labels" -}}
{{ include "penstock.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "penstock.image" -}}
{{- $tag := .Values.image.tag | default (printf "%s-%s" .Chart.AppVersion .Values.model.device) -}}
{{- if eq $tag "latest" -}}
{{- fail "image.tag: latest moves under a running cluster; name a version" -}}
{{- end -}}
{{- if .Values.image.digest -}}
{{- printf "%s@%s" .Values.image.repository .Values.image.digest -}}
{{- else -}}
{{- printf "%s:%s" .Values.image.repository $tag -}}
{{- end -}}
{{- end -}}

{{/* The Secret that the release makes: what no existingSecret gives. */}}
{{- define "penstock.secretName" -}}{{ include "penstock.fullname" . }}-generated{{- end -}}

{{- define "penstock.apiKeySecret" -}}
{{- .Values.front.auth.existingSecret | default (include "penstock.secretName" .) -}}
{{- end -}}

{{- define "penstock.rayAuthSecret" -}}
{{- .Values.ray.auth.existingSecret | default (printf "%s-ray" (include "penstock.fullname" .)) -}}
{{- end -}}

{{- define "penstock.tlsSecret" -}}
{{- if and .Values.tls.existingSecret .Values.tls.certManager.enabled -}}
{{- fail "tls: give existingSecret or certManager, not both" -}}
{{- end -}}
{{- .Values.tls.existingSecret | default (printf "%s-tls" (include "penstock.fullname" .)) -}}
{{- end -}}

{{/* The product's `tls` section. */}}
{{- define "penstock.tlsSettings" -}}
ca: /etc/penstock/tls/ca.crt
cert: /etc/penstock/tls/tls.crt
key: /etc/penstock/tls/tls.key
cluster_token_file: /etc/penstock/tls/cluster-token
{{- end -}}

{{/* Whether the store's index is in Redis: "bundled", "external" or "". */}}
{{- define "penstock.redis" -}}
{{- $external := or .Values.redis.external.url .Values.redis.external.existingSecret -}}
{{- if and $external .Values.redis.bundled.enabled -}}
{{- fail "redis.bundled.enabled: switch it off to use redis.external" -}}
{{- else if and .Values.redis.external.url .Values.redis.external.existingSecret -}}
{{- fail "redis.external: give url or existingSecret, not both" -}}
{{- else if $external -}}external{{- else if .Values.redis.bundled.enabled -}}bundled{{- end -}}
{{- end -}}

{{- define "penstock.storeAddress" -}}
{{- $name := printf "%s-kvstore" (include "penstock.fullname" .) -}}
{{ $name }}-0.{{ $name }}.{{ .Release.Namespace }}.svc:7070
{{- end -}}

{{- define "penstock.frontUrl" -}}
{{- $scheme := ternary "https" "http" (ne .Values.front.tls.existingSecret "") -}}
{{ $scheme }}://{{ include "penstock.fullname" . }}-front.{{ .Release.Namespace }}.svc:{{ .Values.front.service.port }}
{{- end -}}

{{/* Ranks of one worker: arguments are the root and the role's name. */}}
{{- define "penstock.ranks" -}}
{{- $root := index . 0 -}}{{- $role := index . 1 -}}
{{- $parallel := $root.Values.parallel -}}
{{- $ranks := mul (int ($parallel.tensor | default 1)) (int ($parallel.expert | default 1)) -}}
{{- if eq $role "prefill" -}}
{{- $ranks = mul $ranks (int ($parallel.prefill_context | default 1)) -}}
{{- end -}}
{{- $ranks -}}
{{- end -}}

{{- define "penstock.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{- define "penstock.containerSecurity" -}}
allowPrivilegeEscalation: false
privileged: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities: {drop: [ALL]}
{{- end -}}

{{/* Where a pod of the role may run: arguments are the root, the role's values and its name. */}}
{{- define "penstock.placement" -}}
{{- $root := index . 0 -}}{{- $role := index . 1 -}}{{- $name := index . 2 -}}
{{- $selector := deepCopy $role.nodeSelector -}}
{{- if and $role.gpu (eq $root.Values.model.device "cuda") -}}
{{- with $role.gpu.product -}}{{- $_ := set $selector "nvidia.com/gpu.product" . -}}{{- end -}}
{{- end -}}
{{- with $selector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $role.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $role.affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $role.topologySpread }}
topologySpreadConstraints:
{{- range . }}
  - {{- toYaml . | nindent 4 }}
    labelSelector:
      matchLabels:
        {{- include "penstock.selector" $root | nindent 8 }}
        app.kubernetes.io/component: {{ $name }}
{{- end }}
{{- end }}
{{- with $role.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- end -}}

{{- define "penstock.redisUrlEnv" -}}
{{- if eq (include "penstock.redis" .) "bundled" -}}
- name: PENSTOCK_KVSTORE__REDIS_URL
  valueFrom: {secretKeyRef: {name: {{ include "penstock.secretName" . }}, key: redis-url}}
{{- else if .Values.redis.external.existingSecret -}}
- name: PENSTOCK_KVSTORE__REDIS_URL
  valueFrom: {secretKeyRef: {name: {{ .Values.redis.external.existingSecret }}, key: url}}
{{- else if .Values.redis.external.url -}}
- name: PENSTOCK_KVSTORE__REDIS_URL
  value: {{ .Values.redis.external.url | quote }}
{{- end -}}
{{- end -}}

{{/* Selectors in one line, to stand anywhere. */}}
{{- define "penstock.releaseSelector" -}}
{{- dict "matchLabels" (include "penstock.selector" . | fromYaml) | toJson -}}
{{- end -}}

{{- define "penstock.componentSelector" -}}
{{- $labels := include "penstock.selector" (index . 0) | fromYaml -}}
{{- dict "matchLabels" (set $labels "app.kubernetes.io/component" (index . 1)) | toJson -}}
{{- end -}}

{{- define "penstock.raySelector" -}}
{{- $ours := dict "key" "app.kubernetes.io/component" "operator" "In" "values" (list "head" "prefill" "decode" "front") -}}
{{- dict "matchLabels" (include "penstock.selector" . | fromYaml) "matchExpressions" (list $ours) | toJson -}}
{{- end -}}

{{/* Fails where the running StatefulSet has other claims than these values: Kubernetes would refuse
     the change, after others of the same upgrade were made. */}}
{{- define "penstock.claimsStay" -}}
{{- $name := printf "%s-kvstore" (include "penstock.fullname" .) -}}
{{- $running := lookup "apps/v1" "StatefulSet" .Release.Namespace $name -}}
{{- if $running -}}
{{- $disk := .Values.kvstore.disk -}}
{{- $wanted := list -}}{{- $there := list -}}
{{- with $disk.size -}}
{{- $wanted = list (include "penstock.bytes" .) $disk.storageClass -}}
{{- end -}}
{{- range $running.spec.volumeClaimTemplates -}}
{{- $there = list (include "penstock.bytes" .spec.resources.requests.storage) (.spec.storageClassName | default "") -}}
{{- end -}}
{{- if ne (toJson $wanted) (toJson $there) -}}
{{- fail (printf "kvstore.disk: claims of a StatefulSet cannot be changed; first run `kubectl -n %s delete statefulset %s --cascade=orphan`, which leaves the pod running" .Release.Namespace $name) -}}
{{- end -}}
{{- end -}}
{{- end -}}
