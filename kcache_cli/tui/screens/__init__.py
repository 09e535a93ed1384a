"""What opens over the dashboard: help, a layer's detail, the menu of processes."""
