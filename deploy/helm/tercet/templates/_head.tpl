{{/* The head's pod: Ray's head, which has no CPUs for workers, and beside it the container that has it run `tercet
     serve`. The gateway and the controller run in the first, as children of Ray; their probes belong to the second, so
     that a hung gateway restarts the job and not Ray. */}}

{{- define "tercet.headMetadata" -}}
labels: {{- include "tercet.selector" . | nindent 2 }}
  app.kubernetes.io/component: head
annotations:
  tercet/spec-checksum: {{ include "tercet.checksum" . }}
{{- with .Values.head.podAnnotations }}
{{ toYaml . | indent 2 }}
{{- end }}
{{- end -}}

{{- define "tercet.headSpec" -}}
{{- $node := dict "root" . -}}
{{ include "tercet.podCommon" . }}
{{- include "tercet.hostNetwork" . }}
{{- include "tercet.scheduling" .Values.head }}
terminationGracePeriodSeconds: {{ add (include "tercet.stopSeconds" .) 30 }}
containers:
  - name: ray-head
    {{- include "tercet.imageOf" . | nindent 4 }}
    {{- if eq .Values.ray.mode "plain" }}
    command: [tini, --]  # takes in what Ray's processes leave
    args: [ray, start, --head, --block, --port=6379, --node-ip-address=$(POD_IP), --dashboard-host=0.0.0.0,
           --dashboard-agent-listen-port=52365, --metrics-export-port=8080, --num-cpus=0]
    {{- end }}
    env: {{- include "tercet.rayEnv" $node | nindent 6 }}
    ports:
      - {name: gcs-server, containerPort: 6379}
      - {name: dashboard, containerPort: 8265}
      - {name: metrics, containerPort: 8080}
      - {name: http, containerPort: {{ .Values.gateway.httpPort }}}
      - {name: grpc, containerPort: {{ .Values.gateway.grpcPort }}}
    startupProbe: {httpGet: {path: /api/gcs_healthz, port: 8265}, periodSeconds: 5, timeoutSeconds: 5, failureThreshold: 60}
    livenessProbe: {httpGet: {path: /api/gcs_healthz, port: 8265}, periodSeconds: 10, timeoutSeconds: 5, failureThreshold: 6}
    readinessProbe: {httpGet: {path: /api/gcs_healthz, port: 8265}, periodSeconds: 10, timeoutSeconds: 5}
    lifecycle:  # Ray must outlive the job, which drains
      preStop: {exec: {command: {{ include "tercet.jobCommand" (list . "stop") }}}}
    resources: {{- toYaml .Values.head.resources | nindent 6 }}
    securityContext: {{- include "tercet.containerSecurity" . | nindent 6 }}
    volumeMounts: {{- include "tercet.rayMounts" $node | nindent 6 }}
  {{- if eq .Values.ray.submitter "sidecar" }}
  {{- include "tercet.serveContainer" . | nindent 2 }}
  {{- end }}
volumes: {{- include "tercet.volumes" $node | nindent 2 }}
{{- if eq .Values.ray.submitter "sidecar" }}
  - {name: serve-tmp, emptyDir: {sizeLimit: 64Mi}}
{{- end }}
{{- end -}}

{{- define "tercet.jobCommand" -}}
{{- $root := index . 0 -}}
{{- list "python3" "/etc/tercet/serve_job.py" (index . 1) "http://127.0.0.1:8265" (include "tercet.fullname" $root) (include "tercet.stopSeconds" $root) | toJson -}}
{{- end -}}

{{- define "tercet.serveContainer" -}}
{{- $load := ceil (divf .Values.ray.startTimeoutSeconds 10) | int -}}
- name: serve
  {{- include "tercet.imageOf" . | nindent 2 }}
  command: {{ include "tercet.jobCommand" (list . "run") }}
  args: [--, tercet, serve, /etc/tercet/spec.yaml]
  env: {{- include "tercet.rayAuthEnv" . | nindent 4 }}
  startupProbe: {{- include "tercet.gatewayProbe" (dict "root" . "path" "/health" "failures" (add $load 12)) | nindent 4 }}
  livenessProbe:  # a worker that died may take as long to come back
    {{- include "tercet.gatewayProbe" (dict "root" . "path" "/health" "failures" $load) | nindent 4 }}
  readinessProbe: {{- include "tercet.gatewayProbe" (dict "root" . "path" "/ready" "failures" 2) | nindent 4 }}
  resources: {{- toYaml .Values.head.serveResources | nindent 4 }}
  securityContext: {{- include "tercet.containerSecurity" . | nindent 4 }}
  volumeMounts:
    - {name: serve-tmp, mountPath: /tmp}
    - {name: config, mountPath: /etc/tercet, readOnly: true}
    - {name: ray-token, mountPath: /etc/ray-token, readOnly: true}
{{- end -}}

{{- define "tercet.gatewayProbe" -}}
{{- $port := .root.Values.gateway.httpPort -}}
httpGet: {path: {{ .path }}, port: {{ $port }}, scheme: {{ include "tercet.scheme" .root | upper }}}
periodSeconds: 10
timeoutSeconds: 5
failureThreshold: {{ .failures }}
{{- end -}}
