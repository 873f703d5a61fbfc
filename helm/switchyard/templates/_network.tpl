{{/* Parts of network policies. */}}

{{- define "switchyard.peers" -}}
- podSelector:
    matchLabels:
      {{- include "switchyard.selectorLabels" (dict "root" .root) | nindent 6 }}
    matchExpressions:
      - {key: app.kubernetes.io/component, operator: In, values: {{ toJson .components }}}
{{- end -}}

{{- define "switchyard.dnsEgress" -}}
- ports: [{port: {{ int .Values.networkPolicy.dnsPort }}, protocol: UDP}, {port: {{ int .Values.networkPolicy.dnsPort }}, protocol: TCP}]
{{- with .Values.networkPolicy.extraEgress }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* The ports of the servers that are configured; where they stand is not known here. */}}
{{- define "switchyard.redisEgress" -}}
{{- $kvstore := .Values.cluster.kvstore | default dict -}}
{{- $ports := list (include "switchyard.redisPort" $kvstore.control) -}}
{{- with $kvstore.tier -}}{{- $ports = append $ports (include "switchyard.redisPort" .) -}}{{- end -}}
{{- if .Values.ray.gcsFaultTolerance.enabled -}}{{- $ports = append $ports (include "switchyard.redisPort" (include "switchyard.gcsAddress" .)) -}}{{- end -}}
- ports:
    {{- range uniq $ports }}
    - {port: {{ . }}, protocol: TCP}
    {{- end }}
{{- end -}}

{{/* Grafana and Prometheus, which Ray's dashboard asks. */}}
{{- define "switchyard.rayDashboardEgress" -}}
{{- $ports := list -}}
{{- with .Values.monitoring.rayDashboard -}}
{{- range $url := list .grafanaHost .prometheusHost -}}
{{- $port := regexFind ":[0-9]+" (regexReplaceAll "^https?:" $url "") | trimPrefix ":" -}}
{{- if $url -}}{{- $ports = append $ports ($port | default (ternary "443" "80" (hasPrefix "https" $url))) -}}{{- end -}}
{{- end -}}
{{- end -}}
{{- with $ports | uniq -}}
- ports:
    {{- range . }}
    - {port: {{ . }}, protocol: TCP}
    {{- end }}
{{- end -}}
{{- end -}}
