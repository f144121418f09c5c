{{/* Names */}}

{{- define "weir.name" -}}
{{- .Values.nameOverride | default .Chart.Name | trunc 45 | trimSuffix "-" -}}
{{- end }}

{{- define "weir.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 45 | trimSuffix "-" -}}
{{- else if contains (include "weir.name" .) .Release.Name -}}
{{- .Release.Name | trunc 45 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "weir.name" .) | trunc 45 | trimSuffix "-" -}}
{{- end -}}
{{- end }}

{{- define "weir.namespace" -}}
{{- .Values.namespaceOverride | default .Release.Namespace -}}
{{- end }}

{{- define "weir.redis.fullname" -}}
{{- include "weir.fullname" . }}-redis
{{- end }}

{{- define "weir.worker.fullname" -}}
{{- include "weir.fullname" . }}-worker
{{- end }}

{{- define "weir.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- .Values.serviceAccount.name | default (include "weir.fullname" .) -}}
{{- else -}}
{{- .Values.serviceAccount.name | default "default" -}}
{{- end -}}
{{- end }}

{{/* Secrets: ours, or the one that is there */}}

{{- define "weir.keysSecret" -}}
{{- .Values.auth.existingSecret | default (printf "%s-api-keys" (include "weir.fullname" .)) -}}
{{- end }}

{{- define "weir.upstreamSecret" -}}
{{- .Values.upstream.existingSecret | default (printf "%s-upstream" (include "weir.fullname" .)) -}}
{{- end }}

{{- define "weir.redisSecret" -}}
{{- .Values.redis.auth.existingSecret | default (include "weir.redis.fullname" .) -}}
{{- end }}

{{/* Labels: dict "root" $ "component" NAME, and "labels", which win over commonLabels */}}

{{- define "weir.selectorLabels" -}}
app.kubernetes.io/name: {{ include "weir.name" .root }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "weir.labels" -}}
{{ include "weir.podLabels" . }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{- end }}

{{/* Without the chart's version: a new chart that changes nothing of a pod must not restart it. */}}
{{- define "weir.podLabels" -}}
{{ include "weir.selectorLabels" . }}
app.kubernetes.io/part-of: {{ include "weir.name" .root }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
{{- with merge (dict) (.labels | default dict) (.root.Values.commonLabels | default dict) }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* The metadata of an object: dict "root" $ "component" NAME "name" NAME, and "labels", "annotations", "namespace" */}}
{{- define "weir.metadata" -}}
name: {{ .name }}
namespace: {{ .namespace | default (include "weir.namespace" .root) }}
labels:
  {{- include "weir.labels" . | nindent 2 }}
{{- with merge (dict) (.annotations | default dict) (.root.Values.commonAnnotations | default dict) }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* An image's reference: dict "root" $ "image" IMAGE "tag" DEFAULT */}}
{{- define "weir.image" -}}
{{- $registry := .root.Values.global.imageRegistry | default .image.registry -}}
{{- $name := .image.repository -}}
{{- if $registry }}{{ $name = printf "%s/%s" $registry .image.repository }}{{ end -}}
{{- if .image.digest -}}
{{- printf "%s@%s" $name .image.digest -}}
{{- else -}}
{{- printf "%s:%s" $name (.image.tag | default .tag) -}}
{{- end -}}
{{- end }}

{{- define "weir.serverImage" -}}
{{- include "weir.image" (dict "root" . "image" .Values.image "tag" .Chart.AppVersion) -}}
{{- end }}

{{- define "weir.pullSecrets" -}}
{{- range concat (.Values.global.imagePullSecrets | default list) (.Values.imagePullSecrets | default list) | uniq }}
- name: {{ . }}
{{- end }}
{{- end }}

{{/* Numbers that several objects share */}}

{{/* Whether an autoscaler says how many pods there are. */}}
{{- define "weir.scaled" -}}
{{- if or .Values.autoscaling.enabled .Values.keda.enabled }}true{{ end -}}
{{- end }}

{{- define "weir.fewestReplicas" -}}
{{- if .Values.autoscaling.enabled -}}
{{- .Values.autoscaling.minReplicas -}}
{{- else if .Values.keda.enabled -}}
{{- .Values.keda.minReplicaCount -}}
{{- else -}}
{{- .Values.replicaCount -}}
{{- end -}}
{{- end }}

{{/* Seconds that a pod needs to end well. */}}
{{- define "weir.secondsToEnd" -}}
{{- with .Values.shutdown }}{{ add .preStopSeconds .drainDelaySeconds .longestStreamSeconds }}{{ end -}}
{{- end }}

{{- define "weir.gracePeriod" -}}
{{- if kindIs "invalid" .Values.shutdown.gracePeriodSeconds -}}
{{- add (include "weir.secondsToEnd" .) 10 -}}
{{- else -}}
{{- .Values.shutdown.gracePeriodSeconds -}}
{{- end -}}
{{- end }}

{{/* Whether kubelets can sleep by themselves before SIGTERM (1.30). Before, Weir waits that long after it. */}}
{{- define "weir.kubeletSleeps" -}}
{{- if semverCompare ">=1.30.0-0" .Capabilities.KubeVersion.Version }}true{{ end -}}
{{- end }}

{{- define "weir.drainDelay" -}}
{{- with .Values.shutdown -}}
{{- if include "weir.kubeletSleeps" $ }}{{ .drainDelaySeconds }}{{ else }}{{ add .preStopSeconds .drainDelaySeconds }}{{ end -}}
{{- end -}}
{{- end }}

{{/* Whether a conversation may go to any pod: Redis holds it, or there is one pod alone. */}}
{{- define "weir.oneState" -}}
{{- if or (ne .Values.redis.mode "none") (not (or (include "weir.scaled" .) (gt (include "weir.fewestReplicas" . | int) 1))) }}true{{ end -}}
{{- end }}

{{/* Whether nothing names a real upstream. */}}
{{- define "weir.simulated" -}}
{{- $upstream := .Values.upstream -}}
{{- if not (or $upstream.apiKey $upstream.existingSecret $upstream.baseUrl .Values.config.upstreams) }}true{{ end -}}
{{- end }}

{{/* The values that limit callers, by name: nothing where nothing is limited. */}}
{{- define "weir.rulesSet" -}}
{{- $set := list -}}
{{- if .Values.settings.RATE_LIMIT_REQUESTS }}{{ $set = append $set "settings.RATE_LIMIT_REQUESTS" }}{{ end -}}
{{- if .Values.config.limits }}{{ $set = append $set "config.limits" }}{{ end -}}
{{- if .Values.config.budgets }}{{ $set = append $set "config.budgets" }}{{ end -}}
{{- join ", " $set -}}
{{- end }}

{{/* A model that a caller may name; nothing where the values name none, or patterns alone. */}}
{{- define "weir.model" -}}
{{- if .Values.upstream.model -}}
{{- .Values.upstream.model -}}
{{- else if .Values.config.models -}}
{{- $names := list -}}
{{- range .Values.config.models }}{{ if not (contains "*" .name) }}{{ $names = append $names .name }}{{ end }}{{ end -}}
{{- first $names | default "" -}}
{{- else if not .Values.upstream.baseUrl -}}
{{- include "weir.simulated" . | empty | ternary "gpt-4o-mini" "simulator" -}}
{{- end -}}
{{- end }}

{{/*
Changes with a secret word of the values. Whoever may read annotations could try words against a plain hash; scrypt makes
each try slow. No random salt: the same values must make the same pods. dict "root" $ "word" WORD "of" NAME
*/}}
{{- define "weir.secretChecksum" -}}
{{- derivePassword 1 "maximum" .word (printf "%s/%s" (include "weir.namespace" .root) .root.Release.Name) .of | sha256sum -}}
{{- end }}

{{/* A new secret word at the first install, the same one ever after: dict "root" $ "secret" NAME "key" KEY "new" WORD */}}
{{- define "weir.kept" -}}
{{- $there := lookup "v1" "Secret" (include "weir.namespace" .root) .secret | default dict -}}
{{- $data := $there.data | default dict -}}
{{- if hasKey $data .key }}{{ index $data .key | b64dec }}{{ else }}{{ .new }}{{ end -}}
{{- end }}
