"""Token energy: annotation by the reference policy, and the Action Bottleneck diagnostics."""
