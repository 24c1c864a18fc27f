{{/* Pods of Ray nodes, the same in both modes. A caller gives (dict "root" $ "name" NAME "pool" POOL); of the head, both
     are left out. */}}

{{- define "tercet.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{- define "tercet.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}

{{- define "tercet.imageOf" -}}
image: {{ include "tercet.image" . | quote }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
{{- end -}}

{{/* What all pods of the release have. */}}
{{- define "tercet.podCommon" -}}
serviceAccountName: {{ include "tercet.serviceAccountName" . }}
automountServiceAccountToken: false
enableServiceLinks: false
securityContext: {{- include "tercet.podSecurity" . | nindent 2 }}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
{{- range . }}
  - name: {{ . }}
{{- end }}
{{- end }}
{{- end -}}

{{/* Where the node's pods go, of the values of a pool or of the head. */}}
{{- define "tercet.scheduling" -}}
{{- with .runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- with .priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{- define "tercet.hostNetwork" -}}
{{- if .Values.network.hostNetwork }}
hostNetwork: true
dnsPolicy: ClusterFirstWithHostNet
{{- end }}
{{- end -}}

{{/* Of whoever speaks to Ray. */}}
{{- define "tercet.rayAuthEnv" -}}
- {name: RAY_AUTH_MODE, value: token}
- {name: RAY_AUTH_TOKEN_PATH, value: /etc/ray-token/auth_token}
- {name: RAY_USAGE_STATS_ENABLED, value: "0"}
{{- end -}}

{{- define "tercet.rayEnv" -}}
{{- include "tercet.rayAuthEnv" .root }}
- name: POD_IP
  valueFrom: {fieldRef: {fieldPath: status.podIP}}
- {name: XDG_CACHE_HOME, value: /var/cache/tercet}
- {name: TRITON_CACHE_DIR, value: /var/cache/tercet/triton}
- {name: HF_HOME, value: /var/cache/huggingface}
{{- with .root.Values.modelArtifacts.hfToken }}
{{- if .secretName }}
- name: HF_TOKEN
  valueFrom: {secretKeyRef: {name: {{ .secretName }}, key: {{ .secretKey }}}}
{{- end }}
{{- end }}
{{- with .root.Values.env }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "tercet.rayMounts" -}}
- {name: tmp, mountPath: /tmp}
- {name: shm, mountPath: /dev/shm}
- {name: cache, mountPath: /var/cache/tercet}
- {name: huggingface, mountPath: /var/cache/huggingface}
- {name: ray-token, mountPath: /etc/ray-token, readOnly: true}
{{- if include "tercet.modelClaim" .root }}
- {name: model, mountPath: /model, readOnly: true}
{{- end }}
{{- if .root.Values.tls.workers.secretName }}
- {name: peers-tls, mountPath: /etc/tercet-peers, readOnly: true}
{{- end }}
{{- if not .pool }}
- {name: config, mountPath: /etc/tercet, readOnly: true}
{{- if .root.Values.apiKey.secretName }}
- {name: api-keys, mountPath: /etc/tercet-keys, readOnly: true}
{{- end }}
{{- if .root.Values.tls.gateway.secretName }}
- {name: gateway-tls, mountPath: /etc/tercet-tls, readOnly: true}
{{- end }}
{{- end }}
{{- end -}}

{{/* Secrets and the spec are mounted as folders, never by subPath, so that a change reaches what reads them again. */}}
{{- define "tercet.volumes" -}}
{{- $values := .root.Values -}}
{{- $room := default $values.head .pool -}}
- {name: tmp, emptyDir: {sizeLimit: {{ default "20Gi" $room.tmpSize }}}}
- {name: shm, emptyDir: {medium: Memory, sizeLimit: {{ default "1Gi" $room.shmSize }}}}
- {name: cache, emptyDir: {sizeLimit: 5Gi}}
{{- with $values.modelArtifacts.cache }}
{{- if .claim }}
- {name: huggingface, persistentVolumeClaim: {claimName: {{ .claim }}}}
{{- else }}
- {name: huggingface, emptyDir: {sizeLimit: {{ .size }}}}
{{- end }}
{{- end }}
- {name: ray-token, secret: {secretName: {{ include "tercet.rayAuthSecret" .root }}, defaultMode: 0440}}
{{- with include "tercet.modelClaim" .root }}
- {name: model, persistentVolumeClaim: {claimName: {{ . }}, readOnly: true}}
{{- end }}
{{- with $values.tls.workers.secretName }}
- {name: peers-tls, secret: {secretName: {{ . }}, defaultMode: 0440}}
{{- end }}
{{- if not .pool }}
- {name: config, configMap: {name: {{ include "tercet.fullname" .root }}-spec}}
{{- with $values.apiKey.secretName }}
- {name: api-keys, secret: {secretName: {{ . }}, defaultMode: 0440}}
{{- end }}
{{- with $values.tls.gateway.secretName }}
- {name: gateway-tls, secret: {secretName: {{ . }}, defaultMode: 0440}}
{{- end }}
{{- end }}
{{- end -}}
