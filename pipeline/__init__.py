"""ichpipe: a two-stage feature-caching pipeline that finds intracranial haemorrhage on head CT."""
