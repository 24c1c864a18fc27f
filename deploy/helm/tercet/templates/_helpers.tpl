{{/* Names and labels. The longest name made of it is a RayJob's, of 47 characters at most, with 9 of a checksum. */}}
{{- define "tercet.fullname" -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- $full := ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) -}}
{{- default $full .Values.fullnameOverride | trunc 38 | trimSuffix "-" -}}
{{- end -}}

{{/* Of pods and their selectors. Not app.kubernetes.io/name: KubeRay's head Service selects pods by its own value of it. */}}
{{- define "tercet.selector" -}}
app.kubernetes.io/part-of: tercet
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "tercet.labels" -}}
{{ include "tercet.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{- define "tercet.image" -}}
{{- $image := .Values.image -}}
{{- $image.repository }}{{ if $image.digest }}@{{ $image.digest }}{{ else }}:{{ default .Chart.AppVersion $image.tag }}{{ end }}
{{- end -}}

{{- define "tercet.serviceAccountName" -}}
{{- $account := .Values.serviceAccount -}}
{{- if $account.create }}{{ default (include "tercet.fullname" .) $account.name }}{{ else }}{{ default "default" $account.name }}{{ end }}
{{- end -}}

{{- define "tercet.rayAuthSecret" -}}
{{- default (printf "%s-ray-auth" (include "tercet.fullname" .)) .Values.ray.auth.secretName -}}
{{- end -}}

{{/* Of all that a running cluster has read when it started: a change rolls the head, and with it every Ray node. */}}
{{- define "tercet.checksum" -}}
{{- $scripts := printf "%s%s" (.Files.Get "files/serve_job.py") (.Files.Get "files/ask.py") -}}
{{- printf "%s%s" (include "tercet.spec" .) $scripts | sha256sum -}}
{{- end -}}

{{- define "tercet.scheme" -}}
{{- ternary "https" "http" (not (empty .Values.tls.gateway.secretName)) -}}
{{- end -}}

{{/* Seconds that a cluster may take to drain; `tercet serve` itself needs a few more to end its workers. */}}
{{- define "tercet.stopSeconds" -}}
{{- add (ceil (dig "drain_timeout_s" 20 .Values.limits)) 20 -}}
{{- end -}}

{{/* As JSON: the pools, and the roles, that values name, or those of files/defaults.yaml. */}}
{{- define "tercet.pools" -}}
{{- default (.Files.Get "files/defaults.yaml" | fromYaml).pools .Values.pools | toJson -}}
{{- end -}}

{{- define "tercet.roles" -}}
{{- default (.Files.Get "files/defaults.yaml" | fromYaml).roles .Values.roles | toJson -}}
{{- end -}}
