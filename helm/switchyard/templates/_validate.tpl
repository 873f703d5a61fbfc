{{/* Values that the schema cannot judge. Each message begins with the path of the key that is wrong. */}}

{{- define "switchyard.validate" -}}
{{- include "switchyard.validateCluster" . -}}
{{- include "switchyard.validateImages" . -}}
{{- include "switchyard.validatePorts" . -}}
{{- include "switchyard.validateRedis" . -}}
{{- include "switchyard.validateDrains" . -}}
{{- $pools := include "switchyard.pools" . | fromYaml -}}
{{- range $name, $_ := .Values.pools -}}
{{- if not (hasKey $pools $name) -}}
{{- fail (printf "pools.%s: there is no cluster.pools.%s (there is %s)" $name $name (keys $pools | sortAlpha | join ", ")) -}}
{{- end -}}
{{- end -}}
{{- include "switchyard.validateRoles" (dict "root" $ "pools" $pools) -}}
{{- range $name, $pool := $pools -}}
{{- include "switchyard.validatePool" (dict "root" $ "name" $name "pool" $pool) -}}
{{- end -}}
{{- end -}}

{{/* What the chart sets itself, and what needs another value. */}}
{{- define "switchyard.validateCluster" -}}
{{- $cluster := .Values.cluster -}}
{{- $ours := list (list "endpoints" "grpc_host") (list "endpoints" "http_host") (list "ray" "address") (list "kvstore" "control_password_file") (list "kvstore" "tier_password_file") (list "kvstore" "tier_secret_file") -}}
{{- range $path := $ours -}}
{{- $branch := index $cluster (first $path) | default dict -}}
{{- if hasKey $branch (last $path) -}}
{{- fail (printf "cluster.%s.%s: the chart sets it; leave it out" (first $path) (last $path)) -}}
{{- end -}}
{{- end -}}
{{- $endpoints := $cluster.endpoints | default dict -}}
{{- if gt (int ($endpoints.routers | default 1)) 1 -}}
{{- fail "cluster.endpoints.routers: each pod is one router; set router.replicas" -}}
{{- end -}}
{{- $model := ($cluster.model | default dict).path | default "" -}}
{{- if and $model (not (regexMatch "^[./~]" $model)) (not .Values.modelCache.enabled) -}}
{{- fail (printf "modelCache.enabled: must be true for cluster.model.path=%s, which comes from the Hub" $model) -}}
{{- end -}}
{{- if and .Values.modelCache.enabled .Values.modelCache.prefetch.enabled (or (not $model) (regexMatch "^[./~]" $model)) -}}
{{- fail "modelCache.prefetch.enabled: there is nothing to fetch unless cluster.model.path is a Hub id" -}}
{{- end -}}
{{- $scaling := .Values.router.autoscaling -}}
{{- if and (eq $scaling.kind "keda") (not $scaling.prometheusAddress) -}}
{{- fail "router.autoscaling.prometheusAddress: needed with kind: keda" -}}
{{- end -}}
{{- if gt (int $scaling.minReplicas) (int $scaling.maxReplicas) -}}
{{- fail "router.autoscaling.minReplicas: is greater than router.autoscaling.maxReplicas" -}}
{{- end -}}
{{- $gateway := .Values.gateway -}}
{{- if and $gateway.enabled (not $gateway.hostnames) -}}
{{- fail "gateway.hostnames: at least one is needed" -}}
{{- end -}}
{{- if and $gateway.enabled (not (or $gateway.parentRefs $gateway.create.className)) -}}
{{- fail "gateway.parentRefs: name a Gateway, or set gateway.create.className" -}}
{{- end -}}
{{- if and .Values.monitoring.prometheusRule.enabled (not .Values.monitoring.prometheusRule.runbookUrl) -}}
{{- fail "monitoring.prometheusRule.runbookUrl: needed, the address under which deploy/runbooks/ can be read" -}}
{{- end -}}
{{- with .Values.monitoring.rayDashboard -}}
{{- if and .grafanaHost (not .prometheusHost) -}}
{{- fail "monitoring.rayDashboard.prometheusHost: needed with grafanaHost; Ray shows no panel unless it reaches both" -}}
{{- end -}}
{{- end -}}
{{- if and (eq .Values.ray.auth.mode "token") (semverCompare "<2.52.0" .Values.ray.version) -}}
{{- fail (printf "ray.auth.mode: token needs Ray 2.52, and ray.version is %s" .Values.ray.version) -}}
{{- end -}}
{{- if and (eq .Values.ray.upgradeStrategy "NewClusterWithIncrementalUpgrade") (not .Values.ray.incrementalUpgrade) -}}
{{- fail "ray.incrementalUpgrade: needed with ray.upgradeStrategy=NewClusterWithIncrementalUpgrade" -}}
{{- end -}}
{{- end -}}

{{/* Pods of one release run one image: a tag that moves brings another one to each pod that starts later. */}}
{{- define "switchyard.validateImages" -}}
{{- $moving := list "latest" "stable" "unstable" "main" "master" "trunk" "head" "edge" "nightly" "daily" "dev" "devel" "develop" "development" "staging" "testing" "test" "prod" "production" "release" "current" "next" "canary" "rolling" "snapshot" "lts" -}}
{{- range $name := list "autoscaler" "ray" "router" -}}
{{- $image := index $.Values.images $name -}}
{{- $tag := lower $image.tag -}}
{{- if and (not $image.digest) (or (has $tag $moving) (hasPrefix "latest" $tag)) -}}
{{- fail (printf "images.%s.tag: %s is a tag that moves; name a version, or set images.%s.digest" $name $image.tag $name) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Services and probes need the numbers of both ports, which one pod listens on. */}}
{{- define "switchyard.validatePorts" -}}
{{- $endpoints := .Values.cluster.endpoints | default dict -}}
{{- range list "grpc_port" "http_port" -}}
{{- if and (hasKey $endpoints .) (not (index $endpoints .)) -}}
{{- fail (printf "cluster.endpoints.%s: must be a port from 1 to 65535, not 0: the Service has to know it" .) -}}
{{- end -}}
{{- end -}}
{{- if eq (include "switchyard.grpcPort" .) (include "switchyard.httpPort" .) -}}
{{- fail (printf "cluster.endpoints.http_port: port %s is cluster.endpoints.grpc_port too" (include "switchyard.httpPort" .)) -}}
{{- end -}}
{{- end -}}

{{/* All pools together: a request finds its way through them, and they fit into the budget. */}}
{{- define "switchyard.validateRoles" -}}
{{- $cluster := .root.Values.cluster -}}
{{- $roles := list -}}
{{- $least := 0 -}}
{{- range $name, $pool := .pools -}}
{{- $roles = append $roles $pool.role -}}
{{- $least = add $least (mul (int $pool.min) (int $pool.tp) (int $pool.hosts)) -}}
{{- if and (eq (($cluster.engine | default dict).runner | default "torch") "fake") (gt (mul (int $pool.tp) (int $pool.hosts)) 1) -}}
{{- fail (printf "cluster.pools.%s: cluster.engine.runner=fake takes tp=1 and pp=1" $name) -}}
{{- end -}}
{{- end -}}
{{- if not (or (has "mixed" $roles) (and (has "prefill" $roles) (has "decode" $roles))) -}}
{{- fail (printf "cluster.pools: need a mixed pool, or a prefill and a decode pool; there is only %s" ($roles | uniq | join ", ")) -}}
{{- end -}}
{{- $budget := int (($cluster.autoscaling | default dict).max_gpus | default 0) -}}
{{- if and $budget (lt $budget (int $least)) -}}
{{- fail (printf "cluster.autoscaling.max_gpus: must be 0 or at least %d, which the pools need at their smallest, not %d" (int $least) $budget) -}}
{{- end -}}
{{- end -}}

{{/* Leases must be kept, KV blocks must be evicted: never one server for both. */}}
{{- define "switchyard.validateRedis" -}}
{{- $kvstore := .Values.cluster.kvstore | default dict -}}
{{- $control := $kvstore.control | default "" -}}
{{- $tier := $kvstore.tier | default "" -}}
{{- if not (regexMatch "^rediss?://" $control) -}}
{{- fail "cluster.kvstore.control: must be the redis:// URL of a Redis or Valkey that evicts nothing; routers and workers in several pods meet there" -}}
{{- end -}}
{{- range $key, $url := dict "control" $control "tier" $tier -}}
{{- if regexMatch "^[a-z+]+://[^/@]*@" $url -}}
{{- fail (printf "cluster.kvstore.%s: holds a password, which a ConfigMap would show; name a Secret in secrets.%sPassword" $key $key) -}}
{{- end -}}
{{- end -}}
{{- $same := include "switchyard.redisAddress" $control -}}
{{- if and $tier (eq (include "switchyard.redisAddress" $tier) $same) -}}
{{- fail (printf "cluster.kvstore.tier: %s is the address of cluster.kvstore.control too; the tier evicts, the other must not" $same) -}}
{{- end -}}
{{- if and .Values.ray.gcsFaultTolerance.enabled $tier (eq (include "switchyard.redisAddress" $tier) (include "switchyard.redisAddress" (include "switchyard.gcsAddress" .))) -}}
{{- fail "ray.gcsFaultTolerance.redisAddress: is the address of cluster.kvstore.tier too, which evicts" -}}
{{- end -}}
{{- if and (or $tier ($kvstore.peers | default false)) (not .Values.secrets.tierTags.name) -}}
{{- fail "secrets.tierTags.name: needed where KV blocks leave a pod (cluster.kvstore.tier or .peers): each pod would draw another secret and refuse the others' blocks" -}}
{{- end -}}
{{- end -}}

{{/* A pod must live longer than its streams may. */}}
{{- define "switchyard.validateDrains" -}}
{{- $drain := include "switchyard.drain" . | float64 -}}
{{- $longest := include "switchyard.longestStream" . | float64 -}}
{{- if lt $drain $longest -}}
{{- fail (printf "cluster.router.drain_s: %g is shorter than the longest stream, cluster.router.request_timeout_s=%g" $drain $longest) -}}
{{- end -}}
{{- $grace := float64 .Values.router.terminationGracePeriodSeconds -}}
{{- $needs := addf $drain (float64 .Values.router.preStopSeconds) 5 -}}
{{- if le $grace $needs -}}
{{- fail (printf "router.terminationGracePeriodSeconds: %g must be more than %g: router.preStopSeconds + cluster.router.drain_s + 5" $grace $needs) -}}
{{- end -}}
{{- end -}}

{{- define "switchyard.validatePool" -}}
{{- $name := .name -}}
{{- $pool := .pool -}}
{{- $settings := $pool.settings -}}
{{- $raw := index (.root.Values.cluster.pools | default dict) $name | default dict -}}
{{- if or (gt (len $name) 20) (not (regexMatch "^[a-z]([-a-z0-9]*[a-z0-9])?$" $name)) -}}
{{- fail (printf "cluster.pools.%s: the name of a pool becomes part of names in Kubernetes: at most 20 lower-case letters, digits and -, a letter first" $name) -}}
{{- end -}}
{{- if has $name (list "router" "autoscaler" "head" "models" "dashboards" "headgroup") -}}
{{- fail (printf "cluster.pools.%s: another object of the chart has this name" $name) -}}
{{- end -}}
{{- if eq $pool.device "auto" -}}
{{- fail (printf "cluster.pools.%s.device: must be cpu or cuda; a pod asks for GPUs or does not" $name) -}}
{{- end -}}
{{- if hasKey $raw "gpus_per_rank" -}}
{{- if ne (float64 $raw.gpus_per_rank) (floor (float64 $raw.gpus_per_rank)) -}}
{{- fail (printf "cluster.pools.%s.gpus_per_rank: %v is no whole number; a pod gets whole GPUs" $name $raw.gpus_per_rank) -}}
{{- end -}}
{{- end -}}
{{- $perNode := int $settings.gpu.perNode -}}
{{- if and $pool.gpus $perNode -}}
{{- if mod $perNode (int $pool.gpus) -}}
{{- fail (printf "cluster.pools.%s.tp: %d ranks need %d GPUs of one node, which do not divide its %d (pools.%s.gpu.perNode)" $name (int $pool.tp) (int $pool.gpus) $perNode $name) -}}
{{- end -}}
{{- end -}}
{{- if or (gt (int $pool.min) (int $pool.replicas)) (gt (int $pool.replicas) (int $pool.max)) -}}
{{- fail (printf "cluster.pools.%s.replicas: %d is not between min_replicas=%d and max_replicas=%d" $name (int $pool.replicas) (int $pool.min) (int $pool.max)) -}}
{{- end -}}
{{- range $part, $amounts := $settings.resources -}}
{{- if hasKey ($amounts | default dict) $settings.gpu.resourceName -}}
{{- fail (printf "pools.%s.resources.%s: %s follows from cluster.pools.%s.tp; leave it out" $name $part $settings.gpu.resourceName $name) -}}
{{- end -}}
{{- end -}}
{{- $longest := include "switchyard.longestStream" .root | float64 -}}
{{- if lt (float64 $pool.drain) $longest -}}
{{- fail (printf "cluster.pools.%s.drain_timeout_s: %g is shorter than the longest stream, cluster.router.request_timeout_s=%g" $name $pool.drain $longest) -}}
{{- end -}}
{{- $grace := float64 $settings.terminationGracePeriodSeconds -}}
{{- if le $grace (addf $pool.drain 5) -}}
{{- fail (printf "pools.%s.terminationGracePeriodSeconds: %g must be more than %g: cluster.pools.%s.drain_timeout_s + 5" $name $grace (addf $pool.drain 5) $name) -}}
{{- end -}}
{{- $shm := mulf (include "switchyard.shmMi" (dict "root" .root "settings" $settings) | float64) 1048576 -}}
{{- $host := float64 ((.root.Values.cluster.kvstore | default dict).host_bytes | default 536870912) -}}
{{- if lt (mulf $shm 0.8) $host -}}
{{- fail (printf "pools.%s.shmSize: %v is too small: the KV arena, cluster.kvstore.host_bytes=%d, takes at most 0.8 of it" $name $settings.shmSize (int64 $host)) -}}
{{- end -}}
{{- if not $settings.resources.limits.memory -}}
{{- fail (printf "pools.%s.resources.limits.memory: needed here or in poolDefaults" $name) -}}
{{- end -}}
{{- $memory := include "switchyard.bytes" $settings.resources.limits.memory | float64 -}}
{{- if le $memory $shm -}}
{{- fail (printf "pools.%s.resources.limits.memory: %v must be more than the %d MiB of /dev/shm, which counts as the pod's memory" $name $settings.resources.limits.memory (int64 (divf $shm 1048576))) -}}
{{- end -}}
{{- end -}}
