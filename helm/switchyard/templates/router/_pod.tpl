{{- define "switchyard.routerPod" -}}
{{- $router := .Values.router -}}
annotations:
  checksum/config: {{ include "switchyard.configDigest" . }}
serviceAccountName: {{ include "switchyard.serviceAccount" (dict "root" . "component" "router") }}
terminationGracePeriodSeconds: {{ int $router.terminationGracePeriodSeconds }}
topologySpreadConstraints:
  - maxSkew: 1
    topologyKey: topology.kubernetes.io/zone
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- include "switchyard.selectorLabels" (dict "root" . "component" "router") | nindent 8 }}
  - maxSkew: 1
    topologyKey: kubernetes.io/hostname
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- include "switchyard.selectorLabels" (dict "root" . "component" "router") | nindent 8 }}
initContainers:
  {{- include "switchyard.waitForModel" . | nindent 2 }}
main:
  name: router
  command: [switchyard, router, --config, /etc/switchyard/cluster.yaml]
  {{- if .Values.modelCache.enabled }}
  env:
    - {name: HF_HUB_OFFLINE, value: "1"}
  {{- end }}
  ports:
    - {name: grpc, containerPort: {{ include "switchyard.grpcPort" . }}, protocol: TCP}
    - {name: http, containerPort: {{ include "switchyard.httpPort" . }}, protocol: TCP}
  # The endpoints forget the pod while it sleeps; then SIGTERM lets its streams end, for router.drain_s at most.
  lifecycle:
    preStop:
      exec:
        command: [/bin/sleep, {{ $router.preStopSeconds | toString | quote }}]
  startupProbe:
    httpGet: {path: /healthz, port: http}
    periodSeconds: 5
    failureThreshold: {{ max 1 (div (int $router.startupSeconds) 5) }}
  livenessProbe:
    httpGet: {path: /healthz, port: http}
    periodSeconds: 10
    timeoutSeconds: 5
    failureThreshold: 6
  readinessProbe:
    grpc: {port: {{ include "switchyard.grpcPort" . }}}
    periodSeconds: 5
    timeoutSeconds: 3
    failureThreshold: 2
  resources:
    {{- toYaml $router.resources | nindent 4 }}
  volumeMounts:
    {{- include "switchyard.secretMounts" (dict "root" . "names" (list "control")) | nindent 4 }}
    {{- if .Values.modelCache.enabled }}
    - {name: models, mountPath: {{ .Values.modelCache.mountPath }}, readOnly: true}
    {{- end }}
volumes:
  {{- include "switchyard.secretVolumes" (dict "root" . "names" (list "control")) | nindent 2 }}
  {{- include "switchyard.modelVolume" . | nindent 2 }}
{{- end -}}
