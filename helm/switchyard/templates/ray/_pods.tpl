{{/* What head and workers share. */}}
{{- define "switchyard.rayShared" -}}
annotations:
  checksum/config: {{ include "switchyard.configDigest" . }}
volumes:
  {{- include "switchyard.secretVolumes" (dict "root" . "names" (list "control" "tier" "tags")) | nindent 2 }}
  {{- include "switchyard.modelVolume" . | nindent 2 }}
mounts:
  {{- include "switchyard.secretMounts" (dict "root" . "names" (list "control" "tier" "tags")) | nindent 2 }}
  {{- if .Values.modelCache.enabled }}
  - {name: models, mountPath: {{ .Values.modelCache.mountPath }}, readOnly: true}
  {{- end }}
env:
  - {name: RAY_USAGE_STATS_ENABLED, value: "0"}
  {{- if .Values.modelCache.enabled }}
  - {name: HF_HUB_OFFLINE, value: "1"}
  {{- end }}
{{- end -}}

{{- define "switchyard.headPod" -}}
{{- $head := .Values.ray.head -}}
{{- $shared := include "switchyard.rayShared" . | fromYaml -}}
annotations:
  {{- toYaml $shared.annotations | nindent 2 }}
serviceAccountName: {{ include "switchyard.serviceAccount" (dict "root" . "component" "head") }}
# Ray's autoscaler runs beside the head and asks the API server.
automountServiceAccountToken: true
terminationGracePeriodSeconds: {{ int $head.terminationGracePeriodSeconds }}
tmpSize: {{ $head.tmpSize }}
initContainers:
  {{- include "switchyard.waitForModel" . | nindent 2 }}
main:
  name: ray-head
  env:
    {{- toYaml $shared.env | nindent 4 }}
    {{- include "switchyard.rayDashboardEnv" . | nindent 4 }}
  ports:
    - {name: gcs-server, containerPort: 6379, protocol: TCP}
    - {name: dashboard, containerPort: 8265, protocol: TCP}
    - {name: client, containerPort: 10001, protocol: TCP}
    - {name: metrics, containerPort: 8080, protocol: TCP}
    - {name: serve, containerPort: 8000, protocol: TCP}
  startupProbe:
    exec:
      command: {{ include "switchyard.headHealth" . }}
    periodSeconds: 5
    timeoutSeconds: 5
    failureThreshold: 60
  livenessProbe:
    exec:
      command: {{ include "switchyard.headHealth" . }}
    periodSeconds: 10
    timeoutSeconds: 10
    failureThreshold: 12
  readinessProbe:
    exec:
      command: {{ include "switchyard.headHealth" . }}
    periodSeconds: 5
    timeoutSeconds: 5
    failureThreshold: 3
  resources:
    {{- toYaml $head.resources | nindent 4 }}
  volumeMounts:
    {{- include "switchyard.shmMount" . | nindent 4 }}
    {{- with $shared.mounts }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
volumes:
  - name: dshm
    emptyDir: {medium: Memory, sizeLimit: 256Mi}
  {{- with $shared.volumes }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end -}}

{{/* Where Ray's dashboard finds Grafana and Prometheus. It shows Grafana's panels only if it reaches both. */}}
{{- define "switchyard.rayDashboardEnv" -}}
{{- with .Values.monitoring.rayDashboard -}}
{{- if .grafanaHost -}}
- {name: RAY_GRAFANA_HOST, value: {{ .grafanaHost | quote }}}
- {name: RAY_GRAFANA_IFRAME_HOST, value: {{ .grafanaIframeHost | default .grafanaHost | quote }}}
- {name: RAY_GRAFANA_ORG_ID, value: {{ .grafanaOrgId | quote }}}
{{- end -}}
{{- if .prometheusHost }}
- {name: RAY_PROMETHEUS_HOST, value: {{ .prometheusHost | quote }}}
- {name: RAY_PROMETHEUS_NAME, value: {{ .prometheusName | quote }}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* (dict "root" $ "name" "decode" "pool" {...}) */}}
{{- define "switchyard.workerPod" -}}
{{- $pool := .pool -}}
{{- $settings := $pool.settings -}}
{{- $shared := include "switchyard.rayShared" .root | fromYaml -}}
annotations:
  {{- toYaml $shared.annotations | nindent 2 }}
serviceAccountName: {{ include "switchyard.serviceAccount" (dict "root" .root "component" "worker") }}
terminationGracePeriodSeconds: {{ int $settings.terminationGracePeriodSeconds }}
{{- with $settings.gpu.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
tmpSize: {{ $settings.tmpSize }}
homeSize: {{ $settings.homeSize }}
{{- with $settings.topologyKey }}
affinity:
  podAffinity:
    # KV blocks travel between the pools: workers are put near each other where there is space.
    preferredDuringSchedulingIgnoredDuringExecution:
      - weight: 100
        podAffinityTerm:
          topologyKey: {{ . }}
          labelSelector:
            matchLabels:
              {{- include "switchyard.selectorLabels" (dict "root" $.root "component" "worker") | nindent 14 }}
{{- end }}
initContainers:
  {{- include "switchyard.waitForModel" .root | nindent 2 }}
main:
  name: ray-worker
  env:
    {{- toYaml $shared.env | nindent 4 }}
  ports:
    - {name: metrics, containerPort: 8080, protocol: TCP}
    - {name: serve, containerPort: 8000, protocol: TCP}
  # Ray moves the workers of a node that drains: their streams end here, or go on elsewhere after drain_timeout_s.
  lifecycle:
    preStop:
      exec:
        command: [python, -m, deploy.actors.drain_node, --timeout-s, {{ $pool.drain | int | toString | quote }}]
  startupProbe:
    exec:
      command: {{ include "switchyard.raylet" . }}
    periodSeconds: 10
    timeoutSeconds: 5
    failureThreshold: {{ max 1 (div (int $settings.modelLoadSeconds) 10) }}
  livenessProbe:
    exec:
      command: {{ include "switchyard.raylet" . }}
    periodSeconds: 10
    timeoutSeconds: 10
    failureThreshold: 12
  readinessProbe:
    exec:
      command: {{ include "switchyard.raylet" . }}
    periodSeconds: 5
    timeoutSeconds: 5
    failureThreshold: 3
  resources:
    {{- include "switchyard.workerResources" $pool | nindent 4 }}
  volumeMounts:
    {{- include "switchyard.shmMount" .root | nindent 4 }}
    {{- with $shared.mounts }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
volumes:
  - name: dshm
    emptyDir:
      medium: Memory
      sizeLimit: {{ include "switchyard.shmMi" (dict "root" .root "settings" $settings) }}Mi
  {{- with $shared.volumes }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end -}}

{{- define "switchyard.shmMount" -}}
- {name: dshm, mountPath: /dev/shm}
{{- end -}}

{{/* What KubeRay's own probes ask, less Serve's proxy: of a worker over several pods only one has it. */}}
{{- define "switchyard.raylet" -}}
["/bin/sh", "-c", "wget -T 4 -q -O- http://localhost:52365/api/local_raylet_healthz | grep -q success"]
{{- end -}}

{{- define "switchyard.headHealth" -}}
["/bin/sh", "-c", "wget -T 4 -q -O- http://localhost:52365/api/local_raylet_healthz | grep -q success && wget -T 4 -q -O- http://localhost:8265/api/gcs_healthz | grep -q success"]
{{- end -}}

{{/* Requests and limits with the GPUs; as many of both, and CPUs at least as many as Ray hands out. */}}
{{- define "switchyard.workerResources" -}}
{{- $resources := deepCopy .settings.resources -}}
{{- $requests := $resources.requests | default dict -}}
{{- $limits := $resources.limits | default dict -}}
{{- if not $requests.cpu -}}{{- $_ := set $requests "cpu" (toString (int .cpus)) -}}{{- end -}}
{{- if not $requests.memory -}}{{- $_ := set $requests "memory" $limits.memory -}}{{- end -}}
{{- if .gpus -}}
{{- $_ := set $requests .settings.gpu.resourceName (toString (int .gpus)) -}}
{{- $_ := set $limits .settings.gpu.resourceName (toString (int .gpus)) -}}
{{- end -}}
{{- toYaml (dict "requests" $requests "limits" $limits) -}}
{{- end -}}
