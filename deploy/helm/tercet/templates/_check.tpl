{{/* What the schema cannot say: values that contradict each other. Each fault names its path. */}}
{{- define "tercet.check" -}}
{{- $values := .Values -}}
{{- $pools := include "tercet.pools" . | fromJson -}}
{{- $roles := include "tercet.roles" . | fromJson -}}
{{- $wanted := dict "aggregated" "aggregated" "pd" "decode prefill" "ep-d" "decode prefill" "epd" "decode encode prefill" "e-pd" "aggregated encode" -}}
{{- $given := keys $roles | sortAlpha | join " " -}}
{{- if ne $given (index $wanted $values.topology) -}}
{{- fail (printf "roles: topology %s has the roles %s, got %s" $values.topology (index $wanted $values.topology) $given) -}}
{{- end -}}
{{- range $role, $spec := $roles -}}
{{- if not (hasKey $pools (default "default" $spec.pool)) -}}
{{- fail (printf "roles.%s.pool: no pool %s; pools are %s" $role (default "default" $spec.pool) (keys $pools | sortAlpha | join ", ")) -}}
{{- end -}}
{{- end -}}
{{- range $name, $pool := $pools -}}
{{- include "tercet.checkPool" (dict "root" $ "name" $name "pool" $pool) -}}
{{- end -}}
{{- if and (eq $values.ray.mode "plain") (eq $values.ray.submitter "rayjob") -}}
{{- fail "ray.submitter: a RayJob is KubeRay's; use sidecar in ray.mode plain" -}}
{{- end -}}
{{- if and (eq $values.ray.mode "kuberay") (ne $values.autoscaling.kind "none") -}}
{{- fail "autoscaling.kind: scales StatefulSets, which ray.mode kuberay has none of; use none" -}}
{{- end -}}
{{- range $name, $_ := $values.autoscaling.pools -}}
{{- if not (hasKey $pools $name) }}{{ fail (printf "autoscaling.pools.%s: no such pool" $name) }}{{ end -}}
{{- end -}}
{{- include "tercet.checkAccess" . -}}
{{- end -}}

{{- define "tercet.checkPool" -}}
{{- $full := printf "%s-%s" (include "tercet.fullname" .root) .name -}}
{{- if gt (len $full) 52 }}{{ fail (printf "pools.%s: %s is longer than the 52 characters that a StatefulSet's name may have" .name $full) }}{{ end -}}
{{- $amounts := include "tercet.accelerators" . | fromJson -}}
{{- if and (eq .pool.accelerator "gpu") (not $amounts.gpus) -}}
{{- fail (printf "pools.%s.resources.limits: accelerator gpu needs nvidia.com/gpu or amd.com/gpu" .name) -}}
{{- end -}}
{{- if and (eq .pool.accelerator "npu") (not $amounts.npus) -}}
{{- fail (printf "pools.%s.resources.limits: accelerator npu needs huawei.com/Ascend910" .name) -}}
{{- end -}}
{{- if or (and $amounts.gpus (ne .pool.accelerator "gpu")) (and $amounts.npus (ne .pool.accelerator "npu")) -}}
{{- fail (printf "pools.%s.accelerator: %s does not use the accelerators of resources.limits" .name .pool.accelerator) -}}
{{- end -}}
{{- end -}}

{{/* Whoever asks a gateway that wants a key has one. */}}
{{- define "tercet.checkAccess" -}}
{{- $values := .Values -}}
{{- if and $values.apiKey.secretName $values.monitoring.podMonitor.enabled (not $values.monitoring.podMonitor.apiKey.secretName) -}}
{{- fail "monitoring.podMonitor.apiKey.secretName: /metrics takes a key where apiKey is set; name a Secret that has one" -}}
{{- end -}}
{{- end -}}
