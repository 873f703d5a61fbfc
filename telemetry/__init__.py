"""Every metric of the cluster, declared once: its name, type, unit, labels, meaning and buckets.

Routers, workers, KV nodes, the dashboards and `docs/metrics.md` read the declarations. Imports no metrics library.
"""
