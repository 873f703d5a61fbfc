{{- define "switchyard.prefetchPod" -}}
{{- $root := .root -}}
{{- $cache := $root.Values.modelCache -}}
serviceAccountName: {{ include "switchyard.serviceAccount" (dict "root" $root "component" "prefetch") }}
restartPolicy: OnFailure
main:
  name: fetch
  command: [/bin/sh, -ec]
  # The other pods wait for the file.
  args:
    - switchyard models fetch --config /etc/switchyard/cluster.yaml; mkdir -p {{ .done }}; touch {{ .done }}/{{ include "switchyard.prefetchId" $root }}
  {{- with $root.Values.secrets.huggingFace }}
  {{- if .name }}
  env:
    - name: HF_TOKEN
      valueFrom:
        secretKeyRef: {name: {{ .name }}, key: {{ .key }}}
  {{- end }}
  {{- end }}
  resources:
    {{- toYaml $cache.prefetch.resources | nindent 4 }}
  volumeMounts:
    - {name: models, mountPath: {{ $cache.mountPath }}}
volumes:
  {{- include "switchyard.modelVolume" $root | nindent 2 }}
{{- end -}}
