{{- define "switchyard.testPod" -}}
serviceAccountName: {{ include "switchyard.serviceAccount" (dict "root" .root "component" "test") }}
restartPolicy: Never
withoutConfig: true
main:
  name: {{ .name }}
  command:
    {{- toYaml .command | nindent 4 }}
  resources:
    requests: {cpu: 50m, memory: 128Mi}
    limits: {memory: 512Mi}
{{- end -}}
