"""The autoscaler's side of the Kubernetes API: its Lease, its Events, and what it reads of pods and nodes."""
