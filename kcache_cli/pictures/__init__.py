"""Pictures of the dashboard as files: SVG that looks the same everywhere, and PNG made of it."""
