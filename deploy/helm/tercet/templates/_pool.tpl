{{/* A pool's pods: Ray nodes that workers are placed on. Callers give (dict "root" $ "name" NAME "pool" POOL). */}}

{{- define "tercet.poolMetadata" -}}
labels: {{- include "tercet.selector" .root | nindent 2 }}
  app.kubernetes.io/component: {{ printf "pool-%s" .name }}
{{- with .pool.podAnnotations }}
annotations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{- define "tercet.poolSpec" -}}
{{ include "tercet.podCommon" .root }}
{{- include "tercet.hostNetwork" .root }}
{{- include "tercet.scheduling" .pool }}
terminationGracePeriodSeconds: 30
containers:
  - name: ray-worker
    {{- include "tercet.imageOf" .root | nindent 4 }}
    {{- if eq .root.Values.ray.mode "plain" }}
    command: [tini, --]
    args: {{ include "tercet.workerCommand" . }}
    {{- end }}
    env: {{- include "tercet.rayEnv" . | nindent 6 }}
    ports:
      - {name: metrics, containerPort: 8080}
      - {name: agent, containerPort: 52365}
    # Until the head answers, which may be after this node, `ray start` fails and is started anew.
    startupProbe: {httpGet: {path: /api/local_raylet_healthz, port: 52365}, periodSeconds: 5, timeoutSeconds: 5, failureThreshold: 60}
    livenessProbe: {httpGet: {path: /api/local_raylet_healthz, port: 52365}, periodSeconds: 10, timeoutSeconds: 5, failureThreshold: 6}
    readinessProbe: {httpGet: {path: /api/local_raylet_healthz, port: 52365}, periodSeconds: 10, timeoutSeconds: 5}
    resources: {{- include "tercet.poolResources" . | nindent 6 }}
    securityContext:
      {{- include "tercet.containerSecurity" . | nindent 6 }}
      {{- if .pool.rdma }}
        add: [IPC_LOCK]  # registers memory with the network card
      {{- end }}
    volumeMounts: {{- include "tercet.rayMounts" . | nindent 6 }}
volumes: {{- include "tercet.volumes" . | nindent 2 }}
{{- end -}}

{{- define "tercet.poolResources" -}}
{{- $resources := deepCopy .pool.resources -}}
{{- with .pool.rdma -}}
{{- $_ := set $resources.limits .resource .count -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end -}}

{{- define "tercet.workerCommand" -}}
{{- $labels := list -}}
{{- range $key, $value := include "tercet.nodeLabels" . | fromJson }}{{ $labels = append $labels (printf "%s=%s" $key $value) }}{{ end -}}
{{- $amounts := include "tercet.accelerators" . | fromJson -}}
{{- $command := list "ray" "start" "--block" (printf "--address=%s-head:6379" (include "tercet.fullname" .root)) -}}
{{- $command = concat $command (list "--node-ip-address=$(POD_IP)" "--dashboard-agent-listen-port=52365" "--metrics-export-port=8080") -}}
{{- $command = append $command (printf "--num-cpus=%d" (int .pool.resources.limits.cpu)) -}}
{{- $command = append $command (printf "--num-gpus=%d" (int $amounts.gpus)) -}}
{{- if $amounts.npus }}{{ $command = append $command (printf "--resources={\"NPU\": %d}" (int $amounts.npus)) }}{{ end -}}
{{- append $command (printf "--labels=%s" (join "," $labels)) | toJson -}}
{{- end -}}
