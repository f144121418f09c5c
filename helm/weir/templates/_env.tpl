{{/* The environment of the server, a list of names and values. */}}
{{- define "weir.env" -}}
- name: PORT
  value: "8000"
- name: ADMIN_PORT
  value: "9000"
- name: WORKER_COUNT
  value: "1"
- name: DRAIN_DELAY
  value: {{ include "weir.drainDelay" . | quote }}
- name: DRAIN_TIMEOUT
  value: {{ .Values.shutdown.longestStreamSeconds | toJson | quote }}
{{- if .Values.auth.enabled }}
- name: WEIR_KEYS_FILE
  value: /etc/weir/keys/keys.yaml
{{- else }}
- name: AUTH
  value: none
{{- end }}
{{- if .Values.config }}
- name: WEIR_CONFIG
  value: /etc/weir/config/weir.yaml
{{- end }}
{{- with .Values.upstream }}
{{- if or .apiKey .existingSecret }}
- name: OPENAI_API_KEY
  valueFrom:
    secretKeyRef:
      name: {{ include "weir.upstreamSecret" $ }}
      key: {{ .existingSecret | empty | ternary "OPENAI_API_KEY" .existingSecretKey }}
{{- end }}
{{- with .baseUrl }}
- name: OPENAI_BASE_URL
  value: {{ . | quote }}
{{- end }}
{{- with .model }}
- name: OPENAI_MODEL
  value: {{ . | quote }}
{{- end }}
{{- end }}
{{- /* Only where something is to be shared: a pod is replaced when its environment changes. */}}
{{- if and (ne .Values.redis.mode "none") (include "weir.rulesSet" .) }}
- name: REPLICAS
  value: {{ include "weir.fewestReplicas" . | int | max 1 | quote }}
{{- end }}
{{- include "weir.redisEnv" . }}
{{- range $name, $value := .Values.settings }}
{{- if not (kindIs "invalid" $value) }}
- name: {{ $name }}
  value: {{ kindIs "string" $value | ternary $value (toJson $value) | quote }}
{{- end }}
{{- end }}
{{- with .Values.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* REDIS_URL, and apart from it the passwords, which may hold any letters and never stand in an object that is no Secret. */}}
{{- define "weir.redisEnv" -}}
{{- $redis := .Values.redis -}}
{{- if and (eq $redis.mode "sentinel") $redis.sentinel.existingSecret }}
- name: REDIS_SENTINEL_PASSWORD
  valueFrom:
    secretKeyRef:
      name: {{ $redis.sentinel.existingSecret }}
      key: {{ $redis.sentinel.existingSecretKey }}
{{- end }}
{{- if eq $redis.mode "none" }}
{{- else if $redis.urlSecret.name }}
- name: REDIS_URL
  valueFrom:
    secretKeyRef:
      name: {{ $redis.urlSecret.name }}
      key: {{ $redis.urlSecret.key }}
{{- else }}
{{- if or (eq $redis.mode "embedded") $redis.auth.password $redis.auth.existingSecret }}
- name: REDIS_PASSWORD
  valueFrom:
    secretKeyRef:
      name: {{ include "weir.redisSecret" . }}
      key: {{ $redis.auth.existingSecret | empty | ternary "redis-password" $redis.auth.existingSecretKey }}
{{- end }}
- name: REDIS_URL
  value: {{ include "weir.redisAddress" . | quote }}
{{- end }}
{{- end }}

{{- define "weir.redisAddress" -}}
{{- $redis := .Values.redis -}}
{{- $user := $redis.auth.username | empty | ternary "" (printf "%s@" $redis.auth.username) -}}
{{- if eq $redis.mode "embedded" -}}
redis://{{ include "weir.redis.fullname" . }}:6379/0
{{- else if eq $redis.mode "external" -}}
{{- with $redis.external }}{{ .tls | ternary "rediss" "redis" }}://{{ $user }}{{ .host }}:{{ toJson .port }}/{{ toJson .database }}{{ end -}}
{{- else if eq $redis.mode "sentinel" -}}
{{- with $redis.sentinel }}{{ .tls | ternary "rediss" "redis" }}+sentinel://{{ $user }}{{ join "," .nodes }}/{{ toJson .database }}?master={{ .master }}{{ end -}}
{{- else -}}
{{- with $redis.cluster }}{{ .tls | ternary "rediss" "redis" }}+cluster://{{ $user }}{{ join "," .nodes }}{{ end -}}
{{- end -}}
{{- end }}
