{{- define "ringasync.labels" -}}
app.kubernetes.io/name: ringasync
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .role }}
{{- end }}

{{- define "ringasync.redisAddress" -}}
{{- if .Values.redis.enabled -}}
{{ .Release.Name }}-redis.{{ .Release.Namespace }}.svc:6379
{{- else -}}
{{ (urlParse (required "redis.externalUrl: name your server, redis.enabled is false" .Values.redis.externalUrl)).host }}
{{- end -}}
{{- end }}

{{- define "ringasync.redisUrl" -}}
{{- if .Values.redis.enabled -}}
redis://{{ include "ringasync.redisAddress" . }}/0
{{- else -}}
{{ required "redis.externalUrl: name your server, redis.enabled is false" .Values.redis.externalUrl }}
{{- end -}}
{{- end }}

{{- define "ringasync.podSecurity" -}}
runAsNonRoot: true
runAsUser: {{ . }}
runAsGroup: {{ . }}
fsGroup: {{ . }}
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "ringasync.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{/* The pod of one role; .root, .role, .values, .grace, .restartPolicy */}}
{{- define "ringasync.pod" -}}
metadata:
  labels:
    {{- include "ringasync.labels" . | nindent 4 }}
  annotations:
    checksum/config: {{ .root.Values.config | sha256sum }}
spec:
  automountServiceAccountToken: false
  restartPolicy: {{ .restartPolicy }}
  terminationGracePeriodSeconds: {{ .grace }}
  securityContext:
    {{- include "ringasync.podSecurity" 1000 | nindent 4 }}
  {{- with .root.Values.imagePullSecrets }}
  imagePullSecrets:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .values.nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .values.tolerations }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  containers:
    - name: {{ .role }}
      image: "{{ .root.Values.image.repository }}:{{ .root.Values.image.tag | default .root.Chart.AppVersion }}"
      imagePullPolicy: {{ .root.Values.image.pullPolicy }}
      command: [ringasync, {{ .role }}]
      args:
        - /etc/ringasync/run.toml
        - --redis-url={{ include "ringasync.redisUrl" .root }}
        - --model={{ required "model: a hub name or a folder on the shared volume" .root.Values.model }}
        - --set=run.name={{ .root.Values.run }}
        - --set=run.dir=/runs
        - --set=worker.drain_timeout_s={{ .root.Values.worker.drainTimeoutSeconds }}
      env:
        - name: RINGASYNC_REDIS_PASSWORD
          valueFrom: {secretKeyRef: {name: {{ .root.Values.redis.auth.existingSecret }}, key: password}}
        - {name: HOME, value: /tmp}
        - {name: HF_HOME, value: /tmp/hub}
      {{- with .values.livenessProbe }}
      livenessProbe:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      resources:
        {{- toYaml .values.resources | nindent 8 }}
      securityContext:
        {{- include "ringasync.containerSecurity" . | nindent 8 }}
      volumeMounts:
        - {name: config, mountPath: /etc/ringasync, readOnly: true}
        - {name: runs, mountPath: /runs}
        - {name: tmp, mountPath: /tmp}
        - {name: shm, mountPath: /dev/shm}
  volumes:
    - name: config
      configMap: {name: {{ .root.Release.Name }}-config}
    - name: runs
      persistentVolumeClaim: {claimName: {{ .root.Values.storage.existingClaim | default (printf "%s-runs" .root.Release.Name) }}}
    - name: tmp
      emptyDir: {}
    - name: shm
      emptyDir: {medium: Memory}
{{- end }}
