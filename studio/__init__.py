"""The page and its memory: everything a person sees. The only package that imports gradio."""
