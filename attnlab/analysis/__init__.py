"""Only looks: attention statistics, charts and the self-contained report page."""
