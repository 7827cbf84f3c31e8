"""The page that shows a run: its content and its rendering. A pure renderer: it reads no run itself."""
