"""Token energy: annotation by the reference policy."""
