{{/* Combinations that cannot work, refused before anything is installed: one sentence for each. */}}
{{- define "weir.validate" -}}
{{- $v := .Values -}}
{{- $fewest := include "weir.fewestReplicas" . | int -}}
{{- $faults := list -}}

{{- /* the end of a pod */ -}}
{{- $end := include "weir.secondsToEnd" . | int -}}
{{- if lt (include "weir.gracePeriod" . | int) (add $end 5 | int) -}}
{{- $faults = append $faults (printf "shutdown.gracePeriodSeconds is %s, shorter than the longest stream's end: preStopSeconds + drainDelaySeconds + longestStreamSeconds + 5 is %d; leave it empty or raise it." (include "weir.gracePeriod" .) (add $end 5)) -}}
{{- end -}}
{{- if and (has (toString $v.rollout.maxSurge) (list "0" "0%")) (has (toString $v.rollout.maxUnavailable) (list "0" "0%")) -}}
{{- $faults = append $faults "rollout.maxSurge and rollout.maxUnavailable are both 0, so no pod could ever be replaced; leave maxSurge at 1." -}}
{{- end -}}
{{- if le ($v.rollout.progressDeadlineSeconds | int) ($v.rollout.minReadySeconds | int) -}}
{{- $faults = append $faults "rollout.progressDeadlineSeconds must be longer than rollout.minReadySeconds, or every rollout counts as failed." -}}
{{- end -}}

{{- /* scaling */ -}}
{{- if and $v.autoscaling.enabled $v.keda.enabled -}}
{{- $faults = append $faults "autoscaling.enabled and keda.enabled would fight over the number of pods; choose one." -}}
{{- end -}}
{{- with $v.autoscaling -}}
{{- if .enabled -}}
{{- if gt (int .minReplicas) (int .maxReplicas) -}}
{{- $faults = append $faults (printf "autoscaling.minReplicas is %d, above maxReplicas, which is %d." (int .minReplicas) (int .maxReplicas)) -}}
{{- end -}}
{{- if and .targetCPUUtilizationPercentage (not (dig "requests" "cpu" "" ($v.resources | default dict))) -}}
{{- $faults = append $faults "autoscaling.targetCPUUtilizationPercentage is a share of resources.requests.cpu, which is not set; set it, or set the target to null." -}}
{{- end -}}
{{- if not (or .targetCPUUtilizationPercentage .targetInflightPerPod .metrics) -}}
{{- $faults = append $faults "autoscaling has nothing to scale by: set targetCPUUtilizationPercentage, targetInflightPerPod or metrics." -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- with $v.keda -}}
{{- if .enabled -}}
{{- if gt (int .minReplicaCount) (int .maxReplicaCount) -}}
{{- $faults = append $faults (printf "keda.minReplicaCount is %d, above maxReplicaCount, which is %d." (int .minReplicaCount) (int .maxReplicaCount)) -}}
{{- end -}}
{{- if and .cpuUtilizationPercentage (not (dig "requests" "cpu" "" ($v.resources | default dict))) -}}
{{- $faults = append $faults "keda.cpuUtilizationPercentage is a share of resources.requests.cpu, which is not set; set it, or set the target to null." -}}
{{- end -}}
{{- if not (or .cpuUtilizationPercentage .prometheus.serverAddress .triggers) -}}
{{- $faults = append $faults "keda has nothing to scale by: set cpuUtilizationPercentage, prometheus.serverAddress or triggers." -}}
{{- end -}}
{{- if and (eq (int .minReplicaCount) 0) (not .triggers) -}}
{{- $faults = append $faults "keda.minReplicaCount is 0, and neither CPU nor requests in flight, which pods tell, can bring the first pod back: set keda.triggers." -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- /* drains */ -}}
{{- with $v.podDisruptionBudget -}}
{{- if and .enabled (gt $fewest 1) -}}
{{- if kindIs "invalid" .minAvailable -}}
{{- if has (toString .maxUnavailable) (list "0" "0%") -}}
{{- $faults = append $faults "podDisruptionBudget.maxUnavailable is 0, so no node could ever be drained; leave it at 1." -}}
{{- end -}}
{{- /* A percentage is rounded up. */ -}}
{{- else if ge (include "weir.share" (dict "of" $fewest "share" .minAvailable) | int) $fewest -}}
{{- $faults = append $faults (printf "podDisruptionBudget.minAvailable is %s with %d pods, so no node could ever be drained; use maxUnavailable: 1." (toString .minAvailable) $fewest) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- /* upstream */ -}}
{{- with $v.upstream -}}
{{- if and .apiKey .existingSecret -}}
{{- $faults = append $faults "upstream.apiKey and upstream.existingSecret are both set; give the key once." -}}
{{- end -}}
{{- if and .apiKey (not .baseUrl) (not $v.config.upstreams) (not (hasPrefix "sk-" .apiKey)) -}}
{{- $faults = append $faults "upstream.apiKey (not shown) must begin with sk- for OpenAI; for another provider set upstream.baseUrl." -}}
{{- end -}}
{{- if and .baseUrl $v.config.upstreams -}}
{{- $faults = append $faults "upstream.baseUrl is not used where config.upstreams is set; put the address there." -}}
{{- end -}}
{{- end -}}
{{- $env := include "weir.env" (mustMergeOverwrite (dict) (omit . "Values") (dict "Values" (mustMergeOverwrite (dict) (omit $v "extraEnv") (dict "extraEnv" list)))) | fromYamlArray -}}
{{- $names := list -}}
{{- range $env }}{{ $names = append $names .name }}{{ end -}}
{{- $extra := list -}}
{{- range $v.extraEnv -}}
{{- if has .name (concat $names $extra) -}}
{{- $faults = append $faults (printf "extraEnv names %s, which is set already; Kubernetes would take one of the two without a word." .name) -}}
{{- end -}}
{{- $extra = append $extra .name -}}
{{- end -}}
{{- $upstreams := list -}}
{{- range $v.config.upstreams -}}
{{- if has .name $upstreams -}}
{{- $faults = append $faults (printf "config.upstreams: the name %s is there twice." .name) -}}
{{- end -}}
{{- $upstreams = append $upstreams .name -}}
{{- $upstream := .name -}}
{{- range prepend (.api_keys | default list) (dict "env" .api_key_env) -}}
{{- if and .env (not $v.extraEnvFrom) (not (has .env (concat $names $extra))) -}}
{{- $faults = append $faults (printf "config.upstreams: %s takes its key from the variable %s, which no value sets: use upstream.existingSecret (OPENAI_API_KEY), extraEnv or extraEnvFrom." $upstream .env) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- $upstreams = $upstreams | default (list (include "weir.simulated" . | empty | ternary "openai" "simulator")) -}}
{{- $models := list -}}
{{- range $v.config.models -}}
{{- $model := .name -}}
{{- range .upstreams | default (list (pick . "upstream")) -}}
{{- if not (has .upstream $upstreams) -}}
{{- $faults = append $faults (printf "config.models: %s names the upstream %s; there is %s." $model .upstream (join ", " $upstreams)) -}}
{{- end -}}
{{- end -}}
{{- range prepend (.aliases | default list) .name -}}
{{- if has . $models -}}
{{- $faults = append $faults (printf "config.models: the model or alias %s is there twice." .) -}}
{{- end -}}
{{- $models = append $models . -}}
{{- end -}}
{{- end -}}

{{- /* who may call */ -}}
{{- with $v.auth -}}
{{- if and .enabled (not (or .generateKey .keys .existingSecret $v.config.keys)) -}}
{{- $faults = append $faults "auth is on and there is no key: set auth.generateKey, auth.keys, auth.existingSecret or config.keys, or auth.enabled: false to let everybody in." -}}
{{- end -}}
{{- if and .existingSecret .keys -}}
{{- $faults = append $faults "auth.keys is not used where auth.existingSecret is set; put the keys into that Secret." -}}
{{- end -}}
{{- if not .existingSecret -}}
{{- $names := .generateKey | ternary (list "default") list -}}
{{- $hashes := list -}}
{{- range concat (.keys | default list) ($v.config.keys | default list) -}}
{{- if has .name $names -}}
{{- $faults = append $faults (printf "auth.keys and config.keys: the name %s is there twice (the generated key's is default)." .name) -}}
{{- end -}}
{{- if has .sha256 $hashes -}}
{{- $faults = append $faults (printf "auth.keys and config.keys: the hash of %s is there twice." .name) -}}
{{- end -}}
{{- $names = append $names .name -}}
{{- $hashes = append $hashes .sha256 -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- /* Redis */ -}}
{{- with $v.redis -}}
{{- $elsewhere := .urlSecret.name -}}
{{- if and (eq .mode "embedded") .auth.username -}}
{{- $faults = append $faults "redis.auth.username is for a Redis of your own; the embedded one knows its default user alone." -}}
{{- end -}}
{{- if and (eq .mode "embedded") $elsewhere -}}
{{- $faults = append $faults "redis.urlSecret is for a Redis of your own; set redis.mode to external, sentinel or cluster." -}}
{{- end -}}
{{- if and $elsewhere (ne .mode "embedded") (or .auth.username .auth.password .auth.existingSecret) -}}
{{- $faults = append $faults "redis.auth is not used where redis.urlSecret.name is set; put user and password into that address." -}}
{{- end -}}
{{- if and (eq .mode "external") (not .external.host) (not $elsewhere) -}}
{{- $faults = append $faults "redis.mode is external: set redis.external.host or redis.urlSecret.name." -}}
{{- end -}}
{{- if and (eq .mode "sentinel") (not $elsewhere) (or (not .sentinel.nodes) (not .sentinel.master)) -}}
{{- $faults = append $faults "redis.mode is sentinel: set redis.sentinel.nodes and redis.sentinel.master, or redis.urlSecret.name." -}}
{{- end -}}
{{- if and (eq .mode "cluster") (not .cluster.nodes) (not $elsewhere) -}}
{{- $faults = append $faults "redis.mode is cluster: set redis.cluster.nodes or redis.urlSecret.name." -}}
{{- end -}}
{{- $rules := include "weir.rulesSet" $ -}}
{{- if and (eq .mode "none") $rules (gt $fewest 1) -}}
{{- $faults = append $faults (printf "%s with redis.mode none and %d pods: each pod would count by itself; give it a Redis, or one pod." $rules $fewest) -}}
{{- else if and (eq .mode "none") $rules (include "weir.scaled" $) -}}
{{- $faults = append $faults (printf "%s with redis.mode none and an autoscaler: each pod would count by itself; give it a Redis." $rules) -}}
{{- end -}}
{{- end -}}

{{- /* the worker */ -}}
{{- with $v.worker -}}
{{- if and .enabled (not .postgres.existingSecret) -}}
{{- $faults = append $faults "worker.enabled without worker.postgres.existingSecret: name the Secret with the address of PostgreSQL, or with its password." -}}
{{- end -}}
{{- if and .enabled (eq $v.redis.mode "none") -}}
{{- $faults = append $faults "worker.enabled with redis.mode none: the worker copies the ledger from Redis, and there is none." -}}
{{- end -}}
{{- if and .enabled .postgres.caSecret.name (not (hasPrefix "verify-" .postgres.sslMode)) -}}
{{- $faults = append $faults "worker.postgres.caSecret is used by sslMode verify-ca and verify-full alone; set worker.postgres.sslMode." -}}
{{- end -}}
{{- end -}}

{{- /* the edge */ -}}
{{- with $v.ingress -}}
{{- if .enabled -}}
{{- $hosts := .hosts -}}
{{- range .tls -}}
{{- if not (or .hosts $hosts) -}}
{{- $faults = append $faults (printf "ingress.tls (%s) without a host: a certificate is for names; set ingress.hosts." .secretName) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if and $v.httpRoute.enabled (not $v.httpRoute.parentRefs) -}}
{{- $faults = append $faults "httpRoute.enabled without httpRoute.parentRefs: name the Gateway that it belongs to." -}}
{{- end -}}
{{- if and (eq $v.service.type "ClusterIP") (or $v.service.nodePort $v.service.externalTrafficPolicy) -}}
{{- $faults = append $faults "service.nodePort and service.externalTrafficPolicy are for service.type NodePort or LoadBalancer." -}}
{{- end -}}
{{- if and $v.service.loadBalancerSourceRanges (ne $v.service.type "LoadBalancer") -}}
{{- $faults = append $faults "service.loadBalancerSourceRanges is for service.type LoadBalancer." -}}
{{- end -}}
{{- range list "HOST" "ADMIN_HOST" -}}
{{- with index $v.settings . -}}
{{- if or (hasPrefix "127." .) (has . (list "localhost" "::1")) -}}
{{- $faults = append $faults "settings.HOST and settings.ADMIN_HOST must not be loopback: no probe and no caller would reach the pod." -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if and (eq $v.dnsPolicy "None") (not $v.dnsConfig) -}}
{{- $faults = append $faults "dnsPolicy None without dnsConfig: the pods would have no DNS server." -}}
{{- end -}}
{{- if not (regexMatch "^[a-z]([-a-z0-9]*[a-z0-9])?$" (include "weir.fullname" .)) -}}
{{- $faults = append $faults (printf "the name %s is none that a Service can have: it must begin with a letter and hold letters, digits and - alone; set fullnameOverride." (include "weir.fullname" .)) -}}
{{- end -}}

{{- /* objectives */ -}}
{{- range $name, $share := omit $v.metrics.prometheusRule.objectives "ttftSeconds" -}}
{{- if or (le (float64 $share) 0.0) (ge (float64 $share) 1.0) -}}
{{- $faults = append $faults (printf "metrics.prometheusRule.objectives.%s is %s; an objective is a share above 0 and below 1, such as 0.999: of all there would be no budget, of none no alert." $name (toString $share)) -}}
{{- end -}}
{{- end -}}

{{- if $faults -}}
{{- fail (printf "\n\nweir: these values cannot work:\n  - %s\n" (join "\n  - " $faults)) -}}
{{- end -}}
{{- end }}

{{/* A number of pods, given as such or as a percentage of all: dict "of" PODS "share" SHARE */}}
{{- define "weir.share" -}}
{{- if hasSuffix "%" (toString .share) -}}
{{- divf (mulf (trimSuffix "%" .share | float64) .of) 100 | ceil | int -}}
{{- else -}}
{{- int .share -}}
{{- end -}}
{{- end }}
