{{- define "switchyard.autoscalerPod" -}}
{{- $name := include "switchyard.fullname" . -}}
annotations:
  # The whole configuration here: the limits of the pools count too.
  checksum/config: {{ include "switchyard.cluster" . | sha256sum | trunc 16 }}
serviceAccountName: {{ include "switchyard.serviceAccount" (dict "root" . "component" "autoscaler") }}
automountServiceAccountToken: true
terminationGracePeriodSeconds: 30
main:
  name: autoscaler
  command:
    - switchyard
    - autoscaler
    - --config
    - /etc/switchyard/cluster.yaml
    - --ray-dashboard
    - http://{{ include "switchyard.headService" . }}:8265
    - --lease
    - {{ $name }}-autoscaler
    - --ray-service
    - {{ $name }}
    - --host
    - 0.0.0.0
  {{- if and (eq .Values.ray.auth.mode "token") .Values.ray.auth.secretName }}
  env:
    - name: RAY_AUTH_TOKEN
      valueFrom:
        secretKeyRef: {name: {{ .Values.ray.auth.secretName }}, key: auth_token}
  {{- end }}
  ports:
    - {name: metrics, containerPort: 9300, protocol: TCP}
  startupProbe:
    httpGet: {path: /healthz, port: metrics}
    periodSeconds: 5
    failureThreshold: 24
  livenessProbe:
    httpGet: {path: /healthz, port: metrics}
    periodSeconds: 10
    timeoutSeconds: 5
    failureThreshold: 6
  readinessProbe:
    httpGet: {path: /healthz, port: metrics}
    periodSeconds: 10
    timeoutSeconds: 5
  resources:
    {{- toYaml .Values.autoscaler.resources | nindent 4 }}
  volumeMounts:
    {{- include "switchyard.secretMounts" (dict "root" . "names" (list "control")) | nindent 4 }}
volumes:
  {{- include "switchyard.secretVolumes" (dict "root" . "names" (list "control")) | nindent 2 }}
{{- end -}}
