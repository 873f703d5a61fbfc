{{/* The cluster's YAML, and what the objects need to know of its pools. */}}

{{/*
The pools by name, with defaults filled in: what the cluster says of each, and under `settings` what Kubernetes needs.
As YAML: a template returns text only.
*/}}
{{- define "switchyard.pools" -}}
{{- $root := . -}}
{{- $cluster := .Values.cluster -}}
{{- $pair := dict "prefill" (dict "role" "prefill") "decode" (dict "role" "decode") -}}
{{- $demo := not ($cluster.model | default dict).path -}}
{{- $found := dict -}}
{{- range $name, $pool := $cluster.pools | default $pair -}}
{{- $pool = $pool | default dict -}}
{{- $device := $pool.device | default "auto" -}}
{{- if and (eq $device "auto") $demo -}}{{- $device = "cpu" -}}{{- end -}}
{{- $tp := int ($pool.tp | default 1) -}}
{{- $replicas := int ($pool.replicas | default 1) -}}
{{- $perRank := ternary 1.0 ($pool.cpus_per_rank | toString | float64) (not (hasKey $pool "cpus_per_rank")) -}}
{{- $settings := mustMergeOverwrite (deepCopy $root.Values.poolDefaults) (deepCopy (index $root.Values.pools $name | default dict)) -}}
{{- $_ := set $found $name (dict
    "role" $pool.role
    "device" $device
    "tp" $tp
    "hosts" (int ($pool.pp | default 1))
    "gpus" (ternary (mul $tp (int ($pool.gpus_per_rank | default 1))) 0 (eq $device "cuda"))
    "cpus" (int (ceil (addf (mulf (float64 $tp) $perRank) 0.1)))
    "replicas" $replicas
    "min" (int ($pool.min_replicas | default $replicas))
    "max" (int ($pool.max_replicas | default $replicas))
    "drain" (float64 ($pool.drain_timeout_s | default (addf (include "switchyard.longestStream" $root | float64) 10)))
    "settings" $settings
) -}}
{{- end -}}
{{- toYaml $found -}}
{{- end -}}

{{/* Seconds after which a stream ends at the latest. */}}
{{- define "switchyard.longestStream" -}}
{{- $router := .Values.cluster.router | default dict -}}
{{- hasKey $router "request_timeout_s" | ternary $router.request_timeout_s 1800 -}}
{{- end -}}

{{- define "switchyard.drain" -}}
{{- $router := .Values.cluster.router | default dict -}}
{{- hasKey $router "drain_s" | ternary $router.drain_s 10 -}}
{{- end -}}

{{- define "switchyard.grpcPort" -}}
{{- int ((.Values.cluster.endpoints | default dict).grpc_port | default 50051) -}}
{{- end -}}

{{- define "switchyard.httpPort" -}}
{{- int ((.Values.cluster.endpoints | default dict).http_port | default 8000) -}}
{{- end -}}

{{/* `cluster` as it is, and what only the chart knows. */}}
{{- define "switchyard.cluster" -}}
{{- $cluster := deepCopy .Values.cluster -}}
{{- $secrets := .Values.secrets -}}
{{- $_ := set $cluster "name" ($cluster.name | default (include "switchyard.fullname" .)) -}}
{{- $_ := set $cluster "endpoints" (merge (dict "grpc_host" "0.0.0.0" "http_host" "0.0.0.0") ($cluster.endpoints | default dict)) -}}
{{- $_ := set $cluster "ray" (merge (dict "address" (printf "%s:6379" (include "switchyard.headService" .))) ($cluster.ray | default dict)) -}}
{{- $kvstore := $cluster.kvstore | default dict -}}
{{- if $secrets.controlPassword.name -}}{{- $_ := set $kvstore "control_password_file" "/etc/switchyard-secrets/control/password" -}}{{- end -}}
{{- if $secrets.tierPassword.name -}}{{- $_ := set $kvstore "tier_password_file" "/etc/switchyard-secrets/tier/password" -}}{{- end -}}
{{- if $secrets.tierTags.name -}}{{- $_ := set $kvstore "tier_secret_file" "/etc/switchyard-secrets/tags/secret" -}}{{- end -}}
{{- $_ := set $cluster "kvstore" $kvstore -}}
{{- $pools := dict -}}
{{- range $name, $found := include "switchyard.pools" . | fromYaml -}}
{{- $pool := deepCopy (index ($cluster.pools | default dict) $name | default (dict "role" $found.role)) -}}
{{- $_ := set $pool "device" $found.device -}}
{{- $_ := set $pool "drain_timeout_s" $found.drain -}}
{{- /* Ties the pool's workers to the pods of its group: each offers 1000 of a resource of this name. */ -}}
{{- $tie := dict (include "switchyard.poolResource" $name) 1 -}}
{{- $_ := set $pool "resources" (merge $tie ($pool.resources | default dict)) -}}
{{- $_ := set $pools $name $pool -}}
{{- end -}}
{{- $_ := set $cluster "pools" $pools -}}
{{- toYaml $cluster -}}
{{- end -}}

{{- define "switchyard.poolResource" -}}
switchyard-pool-{{ . }}
{{- end -}}

{{/*
Digest of the configuration that a running pod has read: it is restarted when that changes. Numbers of replicas are left
out, otherwise scaling a pool would replace the whole Ray cluster.
*/}}
{{- define "switchyard.configDigest" -}}
{{- $cluster := include "switchyard.cluster" . | fromYaml -}}
{{- $_ := unset $cluster "autoscaling" -}}
{{- range $pool := $cluster.pools -}}
{{- range list "replicas" "min_replicas" "max_replicas" -}}{{- $_ := unset $pool . -}}{{- end -}}
{{- end -}}
{{- toYaml $cluster | sha256sum | trunc 16 -}}
{{- end -}}

{{/* MiB of a pool's /dev/shm: the KV arena takes at most 0.8 of it, and Ray's object store lies there too. */}}
{{- define "switchyard.shmMi" -}}
{{- $bytes := float64 ((.root.Values.cluster.kvstore | default dict).host_bytes | default 536870912) -}}
{{- if .settings.shmSize -}}
{{- divf (include "switchyard.bytes" .settings.shmSize | float64) 1048576 | ceil | int64 -}}
{{- else -}}
{{- addf (divf (divf $bytes 0.8) 1048576) 256 | ceil | int64 -}}
{{- end -}}
{{- end -}}
