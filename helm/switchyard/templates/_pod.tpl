{{/*
The template of every pod of this chart, so that each gets the same security context, volumes and pass-through.

  root       the chart
  component  router, head, worker, autoscaler, prefetch or test
  pool       name of a worker's pool
  own        the component's `pod` values, which add to `podDefaults`
  image      one of `images`
  spec       what the component adds to the pod, with `main` (its container, without image) and `volumes`; as a mapping
*/}}
{{- define "switchyard.pod" -}}
{{- $root := .root -}}
{{- $spec := .spec -}}
{{- $main := $spec.main -}}
{{- $pod := include "switchyard.podSettings" (dict "root" $root "own" .own) | fromYaml -}}
{{- $image := dict "image" (include "switchyard.image" (dict "root" $root "image" .image)) "imagePullPolicy" .image.pullPolicy -}}
{{- $mounts := include "switchyard.mounts" (dict "spec" $spec "pod" $pod) | fromYamlArray -}}
metadata:
  labels:
    {{- include "switchyard.selectorLabels" (dict "root" $root "component" .component) | nindent 4 }}
    {{- with .pool }}
    switchyard/pool: {{ . }}
    {{- end }}
    {{- with $pod.podLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- with merge (dict) ($spec.annotations | default dict) $pod.podAnnotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  serviceAccountName: {{ $spec.serviceAccountName }}
  automountServiceAccountToken: {{ $spec.automountServiceAccountToken | default false }}
  enableServiceLinks: false
  {{- with $spec.terminationGracePeriodSeconds }}
  terminationGracePeriodSeconds: {{ int . }}
  {{- end }}
  {{- with $spec.restartPolicy }}
  restartPolicy: {{ . }}
  {{- end }}
  {{- with $spec.runtimeClassName }}
  runtimeClassName: {{ . }}
  {{- end }}
  securityContext:
    runAsNonRoot: true
    runAsUser: {{ int $root.Values.securityContext.runAsUser }}
    runAsGroup: {{ int $root.Values.securityContext.runAsGroup }}
    fsGroup: {{ int $root.Values.securityContext.fsGroup }}
    fsGroupChangePolicy: OnRootMismatch
    seccompProfile:
      type: RuntimeDefault
  {{- include "switchyard.placement" (dict "pod" $pod "spec" $spec) | nindent 2 }}
  {{- with $spec.initContainers }}
  initContainers:
    {{- range . }}
    - {{- toYaml (merge (dict) . $image (include "switchyard.restricted" $root | fromYaml) (dict "volumeMounts" $mounts "env" (concat (include "switchyard.env" $root | fromYamlArray) $pod.extraEnv))) | nindent 6 }}
    {{- end }}
  {{- end }}
  containers:
    - {{- $env := concat (include "switchyard.env" $root | fromYamlArray) ($main.env | default list) $pod.extraEnv -}}
      {{- toYaml (merge (dict "env" $env "volumeMounts" $mounts) $main $image (include "switchyard.restricted" $root | fromYaml)) | nindent 6 }}
  volumes:
    - name: tmp
      emptyDir:
        sizeLimit: {{ $spec.tmpSize | default "1Gi" }}
    - name: home
      emptyDir:
        sizeLimit: {{ $spec.homeSize | default "1Gi" }}
    {{- if not $spec.withoutConfig }}
    - name: config
      configMap:
        name: {{ include "switchyard.fullname" $root }}
    {{- end }}
    {{- with concat ($spec.volumes | default list) $pod.extraVolumes }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
{{- end -}}

{{/* `podDefaults` with a component's own: maps are merged, lists follow each other, other values replace. */}}
{{- define "switchyard.podSettings" -}}
{{- $base := deepCopy .root.Values.podDefaults -}}
{{- $own := deepCopy (.own | default dict) -}}
{{- range list "tolerations" "imagePullSecrets" "extraEnv" "extraVolumes" "extraVolumeMounts" "topologySpreadConstraints" -}}
{{- $_ := set $own . (concat (index $base . | default list) (index $own . | default list) | default list) -}}
{{- end -}}
{{- toYaml (mustMergeOverwrite $base $own) -}}
{{- end -}}

{{/* Where the pod may run. */}}
{{- define "switchyard.placement" -}}
{{- $spread := concat (.spec.topologySpreadConstraints | default list) .pod.topologySpreadConstraints -}}
{{- $found := dict
    "nodeSelector" .pod.nodeSelector
    "tolerations" .pod.tolerations
    "affinity" (.pod.affinity | default .spec.affinity)
    "topologySpreadConstraints" $spread
    "priorityClassName" .pod.priorityClassName
    "schedulerName" .pod.schedulerName
    "imagePullSecrets" .pod.imagePullSecrets -}}
{{- range $key, $value := $found -}}
{{- if $value }}
{{ toYaml (dict $key $value) }}
{{- end }}
{{- end -}}
{{- end -}}

{{- define "switchyard.mounts" -}}
- {name: tmp, mountPath: /tmp}
- {name: home, mountPath: /home/switchyard}
{{- if not .spec.withoutConfig }}
- {name: config, mountPath: /etc/switchyard, readOnly: true}
{{- end }}
{{- with concat (.spec.main.volumeMounts | default list) .pod.extraVolumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* The restricted profile. On each container too: pods of the Ray operator are made from the containers. */}}
{{- define "switchyard.restricted" -}}
securityContext:
  runAsNonRoot: true
  runAsUser: {{ int .Values.securityContext.runAsUser }}
  runAsGroup: {{ int .Values.securityContext.runAsGroup }}
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities:
    drop: [ALL]
  seccompProfile:
    type: RuntimeDefault
{{- end -}}

{{- define "switchyard.env" -}}
- name: HOME
  value: /home/switchyard
- name: POD_NAME
  valueFrom: {fieldRef: {fieldPath: metadata.name}}
- name: POD_NAMESPACE
  valueFrom: {fieldRef: {fieldPath: metadata.namespace}}
- name: POD_IP
  valueFrom: {fieldRef: {fieldPath: status.podIP}}
{{- if .Values.modelCache.enabled }}
- name: HF_HOME
  value: {{ .Values.modelCache.mountPath }}
{{- end }}
{{- end -}}

{{/* Secrets as files: (dict "root" $ "names" (list "control")). Nothing where their names are not set. */}}
{{- define "switchyard.secretVolumes" -}}
{{- $secrets := .root.Values.secrets -}}
{{- $all := dict "control" (list $secrets.controlPassword "password") "tier" (list $secrets.tierPassword "password") "tags" (list $secrets.tierTags "secret") -}}
{{- range $name := .names -}}
{{- $secret := first (index $all $name) -}}
{{- if $secret.name }}
- name: secret-{{ $name }}
  secret:
    secretName: {{ $secret.name }}
    defaultMode: 0440
    items:
      - key: {{ $secret.key }}
        path: {{ last (index $all $name) }}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "switchyard.secretMounts" -}}
{{- $secrets := .root.Values.secrets -}}
{{- $all := dict "control" $secrets.controlPassword "tier" $secrets.tierPassword "tags" $secrets.tierTags -}}
{{- range $name := .names -}}
{{- if (index $all $name).name }}
- {name: secret-{{ $name }}, mountPath: /etc/switchyard-secrets/{{ $name }}, readOnly: true}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* The model's files, and a container that waits until they are there. */}}
{{- define "switchyard.modelVolume" -}}
{{- with include "switchyard.cacheClaim" . }}
- name: models
  persistentVolumeClaim:
    claimName: {{ . }}
{{- end }}
{{- end -}}

{{- define "switchyard.waitForModel" -}}
{{- if and .Values.modelCache.enabled .Values.modelCache.prefetch.enabled }}
- name: wait-for-model
  command: [/bin/sh, -c]
  args:
    - until [ -e "{{ .Values.modelCache.mountPath }}/.fetched/{{ include "switchyard.prefetchId" . }}" ]; do sleep 5; done
  resources:
    requests: {cpu: 10m, memory: 32Mi}
    limits: {memory: 64Mi}
{{- end }}
{{- end -}}
