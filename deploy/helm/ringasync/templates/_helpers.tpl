{{- define "ringasync.labels" -}}
app.kubernetes.io/name: ringasync
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .role }}
{{- end }}

{{- define "ringasync.redisUrl" -}}
{{- if .Values.redis.enabled -}}
redis://{{ .Release.Name }}-redis.{{ .Release.Namespace }}.svc:6379/0
{{- else -}}
{{- $url := required "redis.externalUrl: name your server, redis.enabled is false" .Values.redis.externalUrl -}}
{{- if not (regexMatch "^rediss?([+](sentinel|cluster))?://[^/?@]+([/?].*)?$" $url) -}}
{{- fail (printf "redis.externalUrl %q: write redis://HOST:PORT/0, redis+sentinel://HOST:26379,HOST:26379/MASTER or redis+cluster://HOST:6379,HOST:6379 (rediss for TLS), without user and password" $url) -}}
{{- end -}}
{{- if and (regexMatch "^rediss?[+]sentinel:" $url) (not (regexMatch "://[^/?]+/[^/?]+" $url)) -}}
{{- fail (printf "redis.externalUrl %q: name the Sentinels' master behind the hosts, redis+sentinel://HOST:26379/MASTER" $url) -}}
{{- end -}}
{{ $url }}
{{- end -}}
{{- end }}

{{/* What KEDA needs to know of the same address: type of trigger, metadata */}}
{{- define "ringasync.kedaRedis" -}}
{{- $url := include "ringasync.redisUrl" . -}}
{{- $hosts := regexReplaceAll "^[^/]*//([^/?]*).*$" $url "${1}" -}}
{{- $db := "0" -}}
{{- if regexMatch "^rediss?[+]cluster:" $url }}
type: redis-cluster-streams
metadata:
  addresses: {{ $hosts }}
{{- else if regexMatch "^rediss?[+]sentinel:" $url }}
{{- if regexMatch "[?&]db=[0-9]+" $url }}{{ $db = regexReplaceAll "^.*[?&]db=([0-9]+).*$" $url "${1}" }}{{ end }}
type: redis-sentinel-streams
metadata:
  addresses: {{ $hosts }}
  sentinelMaster: {{ regexReplaceAll "^[^/]*//[^/?]*/([^/?]*).*$" $url "${1}" }}
  databaseIndex: {{ $db | quote }}
{{- else }}
{{- if regexMatch "^[^/]*//[^/?]*/[0-9]+" $url }}{{ $db = regexReplaceAll "^[^/]*//[^/?]*/([0-9]+).*$" $url "${1}" }}{{ end }}
type: redis-streams
metadata:
  address: {{ $hosts }}
  databaseIndex: {{ $db | quote }}
{{- end }}
{{- if hasPrefix "rediss" $url }}
  enableTLS: "true"
{{- end }}
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

{{/* Its metrics port: what learner/worker/grader add is fixed, see docs/metrics.md */}}
{{- define "ringasync.metricsPort" -}}
{{- $offsets := dict "coordinator" 0 "learner" 1 "worker" 2 "grader" 2 -}}
{{ add .root.Values.metrics.port (index $offsets .role) }}
{{- end }}

{{/* Whether a learner on several nodes is wanted and can be; "" if not */}}
{{- define "ringasync.learnerNodes" -}}
{{- $nodes := int .Values.learner.nodes -}}
{{- $ranks := int .Values.learner.ranksPerNode -}}
{{- $gpus := index (default (dict) .Values.learner.resources.limits) "nvidia.com/gpu" -}}
{{- if and $gpus (ne (int $gpus) $ranks) -}}
{{- fail (printf "learner.ranksPerNode is %d, but learner.resources.limits has %d of nvidia.com/gpu: every rank takes one, so make them equal" $ranks (int $gpus)) -}}
{{- end -}}
{{- if gt $nodes 1 -}}
{{- if and (not .Values.storage.existingClaim) (not (has "ReadWriteMany" .Values.storage.accessModes)) -}}
{{- fail (printf "learner.nodes is %d, but storage.accessModes lacks ReadWriteMany: every node writes its shards of a checkpoint there" $nodes) -}}
{{- end -}}
{{ $nodes }}
{{- end -}}
{{- end }}

{{/* The pod of one role; .root, .role, .values, .grace, .restartPolicy; .isFollower: it answers no
probe, for only rank 0's node does */}}
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
        {{- if eq .role "learner" }}
        - --set=learner.ranks={{ mul .values.nodes .values.ranksPerNode }}
        {{- end }}
        {{- if .root.Values.metrics.port }}
        - --set=metrics.host=0.0.0.0
        - --set=metrics.port={{ .root.Values.metrics.port }}
        {{- end }}
      env:
        - name: RINGASYNC_REDIS_PASSWORD
          valueFrom: {secretKeyRef: {name: {{ .root.Values.redis.auth.existingSecret }}, key: password}}
        {{- if contains "+sentinel:" (include "ringasync.redisUrl" .root) }}
        - name: RINGASYNC_SENTINEL_PASSWORD
          valueFrom: {secretKeyRef: {name: {{ .root.Values.redis.auth.existingSecret }}, key: sentinel-password}}
        {{- end }}
        - {name: HOME, value: /tmp}
        - {name: HF_HOME, value: /tmp/hub}
        {{- if and (eq .role "learner") (include "ringasync.learnerNodes" .root) }}
        # Torchrun's variables, from those that LeaderWorkerSet puts in front of these.
        - {name: PET_NNODES, value: $(LWS_GROUP_SIZE)}
        - {name: PET_NODE_RANK, value: $(LWS_WORKER_INDEX)}
        - {name: PET_RDZV_ENDPOINT, value: "$(LWS_LEADER_ADDRESS):29400"}
        {{- range $name, $value := .values.interconnect }}
        - {name: {{ $name }}, value: {{ $value | quote }}}
        {{- end }}
        {{- end }}
      {{- $isProbed := and .root.Values.metrics.port (not .isFollower) }}
      {{- if $isProbed }}
      ports: [{name: metrics, containerPort: {{ include "ringasync.metricsPort" . }}}]
      # Until a role has joined the run and loaded its model nothing answers. A learner waits for
      # its other nodes as well.
      startupProbe:
        httpGet: {path: /livez, port: metrics}
        periodSeconds: 10
        timeoutSeconds: 5
        failureThreshold: 240
      # Nobody calls a role: this shows people which one waits too long or lacks Redis.
      readinessProbe:
        httpGet: {path: /healthz, port: metrics}
        periodSeconds: 10
        timeoutSeconds: 5
      {{- end }}
      {{- if .values.livenessProbe }}
      livenessProbe:
        {{- toYaml .values.livenessProbe | nindent 8 }}
      {{- else if $isProbed }}
      # Its own loop alone: Redis being away is waited out, and ends the role when it takes too long.
      livenessProbe:
        httpGet: {path: /livez, port: metrics}
        periodSeconds: 10
        timeoutSeconds: 5
        failureThreshold: 6
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
