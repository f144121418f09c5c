{{/*
The groups of one file of files/rules, as the values want them. The file is parsed, not templated: braces in it are
Prometheus' own. dict "root" $ "path" PATH
*/}}
{{- define "weir.ruleGroups" -}}
{{- $values := .root.Values.metrics.prometheusRule -}}
{{- $constants := include "weir.constants" .root | fromYaml -}}
{{- $groups := list -}}
{{- range (.root.Files.Get .path | fromYaml).groups -}}
{{- $rules := list -}}
{{- range .rules -}}
{{- if hasKey . "alert" -}}
{{- if not (has .alert ($values.disabledAlerts | default list)) -}}
{{- $rules = append $rules (include "weir.alert" (dict "rule" . "values" $values) | fromYaml) -}}
{{- end -}}
{{- else if hasKey $constants .record -}}
{{- $expression := regexReplaceAll "^[^ ]+" .expr (toString (index $constants .record)) -}}
{{- $rules = append $rules (merge (dict "expr" ($expression | replace "{}" (printf "{%s}" ($values.matchers | default "")))) .) -}}
{{- else -}}
{{- $rules = append $rules (merge (dict "expr" (.expr | replace "le=\"2.5\"" (printf "le=%q" (include "weir.ttftEdge" $values)))) .) -}}
{{- end -}}
{{- end -}}
{{- if $rules -}}
{{- $groups = append $groups (merge (dict "rules" $rules) .) -}}
{{- end -}}
{{- end -}}
{{- with $groups }}{{ toYaml (dict "groups" .) }}{{ end -}}
{{- end }}

{{/* Name and number of each series of constants.yaml. */}}
{{- define "weir.constants" -}}
{{- with .Values.metrics.prometheusRule -}}
weir:availability:objective: {{ .objectives.availability }}
weir:ttft:objective: {{ .objectives.ttft }}
weir:streams:objective: {{ .objectives.streams }}
weir:ttft:objective_seconds: {{ .objectives.ttftSeconds }}
{{- range $name, $number := .thresholds }}
weir:{{ snakecase $name }}:threshold: {{ $number }}
{{- end }}
{{- end -}}
{{- end }}

{{/* The edge of a bucket as Python writes it: 2.5, 10.0. */}}
{{- define "weir.ttftEdge" -}}
{{- $seconds := toString .objectives.ttftSeconds -}}
{{- if contains "." $seconds }}{{ $seconds }}{{ else }}{{ $seconds }}.0{{ end -}}
{{- end }}

{{/* The first edge of the buckets of durations, which are others, that is not below the same seconds. */}}
{{- define "weir.leaversEdge" -}}
{{- $edge := "" -}}
{{- range list "0.16" "0.32" "0.64" "1.28" "2.56" "5.12" "10.24" "20.48" -}}
{{- if and (not $edge) (ge (float64 .) (float64 $.objectives.ttftSeconds)) }}{{ $edge = . }}{{ end -}}
{{- end -}}
{{- $edge -}}
{{- end }}

{{/* An alert with the values' severity, duration, labels, annotations and addresses: dict "rule" RULE "values" VALUES */}}
{{- define "weir.alert" -}}
{{- $name := .rule.alert -}}
{{- $values := .values -}}
{{- $labels := merge (dict) (.rule.labels | default dict) -}}
{{- with $labels.severity -}}
{{- $severity := get ($values.alertSeverities | default dict) $name | default . -}}
{{- $_ := set $labels "severity" (index $values.severities $severity) -}}
{{- end -}}
{{- $labels = merge $labels ($values.alertLabels | default dict) -}}
{{- $annotations := merge (dict) (.rule.annotations | default dict) -}}
{{- if hasKey $annotations "runbook_url" -}}
{{- if $values.runbookUrl -}}
{{- $_ := set $annotations "runbook_url" ($values.runbookUrl | replace "{alert}" $name) -}}
{{- else -}}
{{- $_ := unset $annotations "runbook_url" -}}
{{- end -}}
{{- end -}}
{{- if and $values.grafanaUrl (hasKey $annotations "dashboard") -}}
{{- $_ := set $annotations "dashboard" (printf "%s%s" (trimSuffix "/" $values.grafanaUrl) $annotations.dashboard) -}}
{{- end -}}
{{- $annotations = merge $annotations ($values.alertAnnotations | default dict) -}}
{{- $expression := .rule.expr | replace "le=\"2.56\"" (printf "le=%q" (include "weir.leaversEdge" $values)) -}}
{{- $rule := merge (dict "expr" $expression) (omit .rule "labels" "annotations") -}}
{{- with get ($values.alertFor | default dict) $name }}{{ $_ := set $rule "for" . }}{{ end -}}
{{- with $labels }}{{ $_ := set $rule "labels" . }}{{ end -}}
{{- with $annotations }}{{ $_ := set $rule "annotations" . }}{{ end -}}
{{- toYaml $rule -}}
{{- end }}
