"""Steps on a CPU with what lies between attentions compiled by Inductor."""
