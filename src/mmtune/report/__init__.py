"""Results as text, Markdown and model cards."""
