{{/* The cluster spec that `tercet serve` reads, of the values. */}}
{{- define "tercet.spec" -}}
{{- include "tercet.check" . -}}
{{- $values := .Values -}}
{{- $spec := dict "name" (include "tercet.fullname" .) "topology" $values.topology -}}
{{- $_ := set $spec "model" (merge (dict "source" (include "tercet.source" .)) $values.model) -}}
{{- $pools := dict -}}
{{- range $name, $pool := include "tercet.pools" . | fromJson -}}
{{- $_ := set $pools $name (include "tercet.pool" (dict "root" $ "name" $name "pool" $pool) | fromJson) -}}
{{- end -}}
{{- $_ := set $spec "pools" $pools -}}
{{- $_ := set $spec "roles" (include "tercet.roles" . | fromJson) -}}
{{- $_ := set $spec "gateway" (include "tercet.gateway" . | fromJson) -}}
{{- $_ := set $spec "ray" (dict "address" "auto" "start_timeout_s" $values.ray.startTimeoutSeconds) -}}
{{- $_ := set $spec "network" (include "tercet.network" . | fromJson) -}}
{{- range $part := list "transfer" "limits" "logging" -}}
{{- with index $values $part }}{{ $_ := set $spec $part . }}{{ end -}}
{{- end -}}
{{- with $values.tracing -}}
{{- if .otlpEndpoint }}{{ $_ := set $spec "tracing" (dict "otlp_endpoint" .otlpEndpoint "sample_ratio" .sampleRatio) }}{{ end -}}
{{- end -}}
{{- toYaml $spec -}}
{{- end -}}

{{/* hf://org/model is the hub's id, pvc://claim/path a path below /model, package:NAME itself. */}}
{{- define "tercet.source" -}}
{{- $uri := .Values.modelArtifacts.uri -}}
{{- if hasPrefix "hf://" $uri }}{{ trimPrefix "hf://" $uri }}
{{- else if hasPrefix "pvc://" $uri }}/model/{{ regexReplaceAll "^pvc://[^/]+/" $uri "" }}
{{- else }}{{ $uri }}{{ end -}}
{{- end -}}

{{- define "tercet.modelClaim" -}}
{{- with .Values.modelArtifacts.uri }}{{ if hasPrefix "pvc://" . }}{{ regexFind "[^/]+" (trimPrefix "pvc://" .) }}{{ end }}{{ end -}}
{{- end -}}

{{/* What a pool of the spec says: what all its pods have, and the label that Ray gives their nodes. */}}
{{- define "tercet.pool" -}}
{{- $limits := .pool.resources.limits -}}
{{- $autoscaled := index .root.Values.autoscaling.pools .name -}}
{{- $nodes := ternary (dig "maxReplicas" 0 (default dict $autoscaled)) .pool.replicas (not (empty $autoscaled)) | int -}}
{{- $pool := dict "accelerator" .pool.accelerator "labels" (include "tercet.nodeLabels" . | fromJson) -}}
{{- $_ := set $pool "cpus" (mul $nodes (int $limits.cpu)) -}}
{{- $amounts := include "tercet.accelerators" . | fromJson -}}
{{- if $amounts.gpus }}{{ $_ := set $pool "gpus" (mul $nodes (int $amounts.gpus)) }}{{ end -}}
{{- if $amounts.npus }}{{ $_ := set $pool "npus" (mul $nodes (int $amounts.npus)) }}{{ end -}}
{{- toJson $pool -}}
{{- end -}}

{{- define "tercet.nodeLabels" -}}
{{- merge (dict "pool" .name) (default dict .pool.labels) | toJson -}}
{{- end -}}

{{- define "tercet.accelerators" -}}
{{- $limits := .pool.resources.limits -}}
{{- $gpus := coalesce (index $limits "nvidia.com/gpu") (index $limits "amd.com/gpu") 0 -}}
{{- dict "gpus" (int $gpus) "npus" (int (default 0 (index $limits "huawei.com/Ascend910"))) | toJson -}}
{{- end -}}

{{- define "tercet.gateway" -}}
{{- $gateway := .Values.gateway -}}
{{- $made := dict "http" (dict "host" $gateway.host "port" $gateway.httpPort) -}}
{{- $_ := set $made "grpc" (dict "host" $gateway.host "port" $gateway.grpcPort) -}}
{{- with $gateway.cors_origins }}{{ $_ := set $made "cors_origins" . }}{{ end -}}
{{- with $gateway.images }}{{ $_ := set $made "images" . }}{{ end -}}
{{- if .Values.apiKey.secretName }}{{ $_ := set $made "api_keys" (printf "/etc/tercet-keys/%s" .Values.apiKey.secretKey) }}{{ end -}}
{{- if .Values.tls.gateway.secretName -}}
{{- $tls := dict "certificate" "/etc/tercet-tls/tls.crt" "key" "/etc/tercet-tls/tls.key" -}}
{{- $_ := set $made "tls" $tls -}}
{{- end -}}
{{- toJson $made -}}
{{- end -}}

{{- define "tercet.network" -}}
{{- $made := dict "host" "node" -}}
{{- with .Values.tls.workers -}}
{{- if .secretName -}}
{{- $files := dict "certificate" "/etc/tercet-peers/tls.crt" "key" "/etc/tercet-peers/tls.key" "ca" "/etc/tercet-peers/ca.crt" -}}
{{- $_ := set $made "tls" (set $files "name" .name) -}}
{{- end -}}
{{- end -}}
{{- toJson $made -}}
{{- end -}}
