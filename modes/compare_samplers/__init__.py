"""The mode "compare_samplers"."""
