{{/* Names, labels, images and small arithmetic. */}}

{{/* Name of everything that the chart makes: at most 40 characters, so that what KubeRay appends to it stays valid. */}}
{{- define "switchyard.fullname" -}}
{{- $both := printf "%s-%s" .Release.Name .Chart.Name -}}
{{- $name := .Values.fullnameOverride | default (ternary .Release.Name $both (contains .Chart.Name .Release.Name)) -}}
{{- $name = regexReplaceAll "[^a-z0-9-]+" (lower $name) "-" | trimAll "-" -}}
{{- if not (regexMatch "^[a-z]" $name) -}}{{- $name = printf "s-%s" $name -}}{{- end -}}
{{- if gt (len $name) 40 -}}
{{- /* The digest keeps two long releases apart. */ -}}
{{- printf "%s-%s" ($name | trunc 33 | trimSuffix "-") ($name | sha256sum | trunc 6) -}}
{{- else -}}
{{- $name -}}
{{- end -}}
{{- end -}}

{{/* What tells the pods of one component from all others. Selectors cannot be changed later: neither can this. */}}
{{- define "switchyard.selectorLabels" -}}
app.kubernetes.io/name: {{ .root.Chart.Name }}
app.kubernetes.io/instance: {{ .root.Release.Name | quote }}
{{- with .component }}
app.kubernetes.io/component: {{ . }}
{{- end }}
{{- end -}}

{{- define "switchyard.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
{{ include "switchyard.selectorLabels" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
app.kubernetes.io/part-of: {{ .root.Chart.Name }}
{{- end -}}

{{/* Metadata of an object: (dict "root" $ "component" "router" "name" "suffix"). */}}
{{- define "switchyard.metadata" -}}
name: {{ include "switchyard.fullname" .root }}{{ with .name }}-{{ . }}{{ end }}
namespace: {{ .root.Release.Namespace }}
labels:
  {{- include "switchyard.labels" . | nindent 2 }}
  {{- with .labels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- with .annotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* (dict "root" $ "image" .Values.images.router): a digest counts more than a tag. */}}
{{- define "switchyard.image" -}}
{{- $registry := .root.Values.images.registry -}}
{{- $path := ternary (printf "%s/%s" $registry .image.repository) .image.repository (ne $registry "") -}}
{{- if .image.digest -}}
{{- printf "%s@%s" $path .image.digest -}}
{{- else -}}
{{- printf "%s:%s" $path (.image.tag | default .root.Chart.AppVersion) -}}
{{- end -}}
{{- end -}}

{{/* HOST:PORT of a Redis URL: without scheme, user, password, path and query. The first one of a cluster. */}}
{{- define "switchyard.redisAddress" -}}
{{- $rest := regexReplaceAll "^[a-z+]+://" . "" -}}
{{- $host := regexReplaceAll "^[^@/]*@" $rest "" -}}
{{- $host = regexFind "^[^/?,]*" $host -}}
{{- if regexMatch ":[0-9]+$" $host -}}{{- $host -}}{{- else -}}{{- printf "%s:6379" $host -}}{{- end -}}
{{- end -}}

{{- define "switchyard.redisPort" -}}
{{- regexFind "[0-9]+$" (include "switchyard.redisAddress" .) -}}
{{- end -}}

{{/* Bytes of a quantity such as 64Gi, 1.5G or 1000. */}}
{{- define "switchyard.bytes" -}}
{{- $text := toString . -}}
{{- $units := dict "" 1.0 "k" 1e3 "M" 1e6 "G" 1e9 "T" 1e12 "Ki" 1024.0 "Mi" 1048576.0 "Gi" 1073741824.0 "Ti" 1099511627776.0 -}}
{{- $unit := regexFind "[kMGTi]+$" $text -}}
{{- int64 (mulf (float64 (trimSuffix $unit $text)) (index $units $unit)) -}}
{{- end -}}

{{- define "switchyard.serviceAccount" -}}
{{- $own := index .root.Values.serviceAccounts .component | default dict -}}
{{- $own.name | default (printf "%s-%s" (include "switchyard.fullname" .root) .component) -}}
{{- end -}}

{{/* Name of the Service by which KubeRay publishes the head of this RayService, whichever cluster is current. */}}
{{- define "switchyard.headService" -}}
{{- include "switchyard.fullname" . }}-head-svc
{{- end -}}

{{/* The model's files come from a claim. */}}
{{- define "switchyard.cacheClaim" -}}
{{- if .Values.modelCache.enabled -}}
{{- .Values.modelCache.existingClaim | default (printf "%s-models" (include "switchyard.fullname" .)) -}}
{{- end -}}
{{- end -}}

{{/* Changes when another model is to be fetched, or by another image. */}}
{{- define "switchyard.prefetchId" -}}
{{- $model := (.Values.cluster.model | default dict).path | default "" -}}
{{- printf "%s %s" $model (include "switchyard.image" (dict "root" . "image" .Values.images.ray)) | sha256sum | trunc 10 -}}
{{- end -}}

{{/* Where Ray keeps the state of its head: a Redis that keeps everything. */}}
{{- define "switchyard.gcsAddress" -}}
{{- $control := (.Values.cluster.kvstore | default dict).control | default "" -}}
{{- .Values.ray.gcsFaultTolerance.redisAddress | default (printf "redis://%s" (include "switchyard.redisAddress" $control)) -}}
{{- end -}}
