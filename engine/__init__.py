"""From a request to a picture. Knows nothing of the page, of SQL or of HTTP."""
