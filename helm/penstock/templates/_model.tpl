{{/* What model.model is in the pods. */}}
{{- define "penstock.modelPath" -}}
{{- $source := .Values.model.source -}}
{{- if eq $source.type "shipped" -}}
{{- if not (has .Values.model.name (list "ledger" "fake")) -}}
{{- fail (printf "model.name: the image ships ledger and fake, not %s; set model.source.type" .Values.model.name) -}}
{{- end -}}
{{- .Values.model.name -}}
{{- else -}}
{{- if and (eq $source.type "pvc") (not $source.claimName) -}}
{{- fail "model.source.claimName: name the claim that holds the model" -}}
{{- end -}}
{{- if has $source.type (list "hub" "object") -}}
{{- if not $source.uri -}}{{- fail "model.source.uri: name the model to fetch" -}}{{- end -}}
{{- if not (and $source.digest $source.configDigest) -}}
{{- fail "model.source.digest: give it and configDigest, as `penstock fetch` prints them; nothing is served unchecked" -}}
{{- end -}}
{{- end -}}
{{- $path := $source.path | default (ternary "" "model" (eq $source.type "pvc")) -}}
{{- printf "/models/%s" $path | trimSuffix "/" -}}
{{- end -}}
{{- end -}}

{{- define "penstock.modelVolume" -}}
{{- $source := .Values.model.source -}}
{{- if $source.claimName -}}
- {name: model, persistentVolumeClaim: {claimName: {{ $source.claimName }}}}
{{- else -}}
- {name: model, emptyDir: {sizeLimit: {{ $source.size }}}}
{{- end -}}
{{- end -}}

{{/* Fetches, or only checks, the model before Ray starts: root, role's name. A front reads the
     tokenizer and small files alone; with a claim everybody finds the whole folder in it. */}}
{{- define "penstock.modelInit" -}}
{{- $root := index . 0 -}}{{- $name := index . 1 -}}
{{- $source := $root.Values.model.source -}}
{{- $small := and (eq $name "front") (not $source.claimName) -}}
{{- if or (ne $source.type "pvc") $source.digest -}}
initContainers:
  - name: model
    image: {{ include "penstock.image" $root | quote }}
    imagePullPolicy: {{ $root.Values.image.pullPolicy }}
    securityContext: {{- include "penstock.containerSecurity" $root | nindent 6 }}
    command: [penstock, fetch]
    args:
      {{- if ne $source.type "pvc" }}
      - --from={{ ternary (printf "hub:%s" $source.uri) $source.uri (eq $source.type "hub") }}
      {{- with $source.revision }}
      - --revision={{ . }}
      {{- end }}
      {{- end }}
      {{- if $small }}
      - --without-weights
      - --digest={{ $source.configDigest }}
      {{- else }}
      - --digest={{ $source.digest }}
      {{- end }}
      - {{ include "penstock.modelPath" $root }}
    env:
      - {name: HOME, value: /tmp}
    {{- with $source.existingSecret }}
    envFrom:
      - secretRef: {name: {{ . }}}
    {{- end }}
    resources:
      requests: {cpu: 200m, memory: 512Mi}
      limits: {memory: 1Gi}
    volumeMounts:
      - {name: tmp, mountPath: /tmp}
      - {name: model, mountPath: /models{{ if eq $source.type "pvc" }}, readOnly: true{{ end }}}
{{- end -}}
{{- end -}}
