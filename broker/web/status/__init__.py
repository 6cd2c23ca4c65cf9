"""The status page at ``/``, for people with a browser: HTML made here, without scripts or anything from elsewhere."""
